"""What it costs threads that train when freed tensors' memory is left to the C library: why the runner
keeps it (``csrc/cpu/block_cache.h``).

    pytest benchmarks/bench_freed_memory.py --benchmark-json FILE

In a process, threads with one intra-op thread each train small residual nets in plain torch that have
nothing to do with each other, as stages on the CPU. Processes with different memory take turns: the C
library's as it comes, the C library's set up to keep what is freed, which takes one arena for all
threads, and the runner's cache. They are started anew after some rounds. Beside the time: how often a
step asks the system for a page, and how often a thread goes to sleep in it.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import quartiles
from benchmarks.steps import HYPER, plain_step
from benchmarks.turns import Player
from fdg_cuda import models
from fdg_cuda._core import keep_freed_memory, keeps_blocks, kept_bytes

MODEL, BATCH = "resnet20", 32
WARM_UP, STEPS = 3, 12
SITTINGS, ROUNDS = 4, 5
LIMIT = 120.0  # seconds of a turn
LIBRARY, SET_UP, CACHE = "library", "set_up", "cache"
ENVIRONMENTS = {
    LIBRARY: {},
    SET_UP: {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that every glibc takes
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    },
    CACHE: {},
}


@dataclass(frozen=True)
class Steps:
    """Of a step.

    Attributes:
        ms: until the last thread is done, over the number of steps.
        pages: asked for by the process, per step of a thread.
        sleeps: voluntary context switches of the process, likewise.
    """

    ms: float
    pages: float
    sleeps: float


class Training:
    """A net of its own, on a thread of its own."""

    def __init__(self, batch_size: int) -> None:
        model: Any = models.build(MODEL)
        self._model = model.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self._model.parameters(), **HYPER)
        x = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        self._batch = (x, torch.randint(0, 10, (batch_size,)))
        self._thread = ThreadPoolExecutor(1)

    def start(self, count: int) -> Callable[[], None]:
        """So many steps; what waits until they are done."""
        return self._thread.submit(self._steps, count).result

    def _steps(self, count: int) -> None:
        for _ in range(count):
            plain_step(self._model, self._optimizer, self._batch)


def trainings(kind: str, threads: int, batch_size: int) -> Callable[[int], Steps]:
    """What trains so many steps in so many threads, in a process for it alone."""
    if kind == CACHE:
        keep_freed_memory()
    nets = [Training(batch_size) for _ in range(threads)]

    def train(count: int) -> None:
        for wait in [net.start(count) for net in nets]:
            wait()

    def turn(count: int) -> Steps:
        train(WARM_UP)
        if (kept_bytes() > 0) is not (kind == CACHE):
            raise RuntimeError(f"{kind}: the runner's cache keeps {kept_bytes()} bytes")
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        train(count)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
        return Steps(
            ms=1e3 * seconds / count,
            pages=(after.ru_minflt - before.ru_minflt) / (count * threads),
            sleeps=(after.ru_nvcsw - before.ru_nvcsw) / (count * threads),
        )

    return turn


def sitting(
    threads: int, batch_size: int, steps: int, rounds: int, seed: int
) -> list[dict[str, Steps]]:
    """Rounds of processes started for them, one for each kind of memory."""
    players: dict[str, Player] = {}
    with ExitStack() as stack:
        for kind, environment in ENVIRONMENTS.items():
            makes = [partial(trainings, kind, threads, batch_size)]
            players[kind] = Player(makes, LIMIT, {**environment, "OMP_NUM_THREADS": "1"})
            stack.callback(players[kind].stop)
        for player in players.values():
            player.get_ready()
            player.turn(steps)
        order = random.Random(seed)
        return [
            {
                kind: players[kind].turn(steps)[0].value
                for kind in order.sample(list(players), len(players))
            }
            for _ in range(rounds)
        ]


def test_freed_memory(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):  # the library's as it comes
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD"):
            monkeypatch.delenv(name)
    if not keeps_blocks():
        pytest.skip("torch's calls of the C allocator cannot be led through a cache here")
    quick = request.config.getoption("quick")
    threads = max(2, len(os.sched_getaffinity(0)))
    batch_size = 2 if quick else BATCH
    sittings = 1 if quick else SITTINGS
    rounds: list[dict[str, Steps]] = []

    def sit() -> None:
        steps, count = (1, 2) if quick else (STEPS, ROUNDS)
        rounds.extend(sitting(threads, batch_size, steps, count, seed=len(rounds)))

    benchmark.pedantic(sit, rounds=sittings)
    found = {
        what: {
            kind: quartiles([getattr(each[kind], what) for each in rounds]) for kind in ENVIRONMENTS
        }
        for what in ("ms", "pages", "sleeps")
    }
    ratio = {
        kind: quartiles([each[kind].ms / each[CACHE].ms for each in rounds])
        for kind in ENVIRONMENTS
    }
    benchmark.extra_info.update(
        kind="freed_memory",
        model=MODEL,
        batch_size=batch_size,
        threads=threads,
        sittings=sittings,
        **found,
        ratio=ratio,
    )
    print("  time / that with the cache:", {k: round(q["median"], 3) for k, q in ratio.items()})
