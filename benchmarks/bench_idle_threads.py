"""What idle OpenMP threads of another thread cost a step, which is why the runner ends them.

    pytest benchmarks/bench_idle_threads.py --benchmark-json FILE

A thread trains a small MLP in plain torch with all cores, as a CPU stage would, while the main thread
does nothing: in turns with a team of OpenMP threads of its own, which all sleep, and without one.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks.harness import quartiles
from benchmarks.steps import HYPER, plain_step
from fdg_cuda._core import end_idle_openmp_threads
from fdg_cuda.cpu_threads import set_threads_here

WIDTHS, BATCH = (784, 256, 256, 256, 10), 32
STEPS, ROUNDS = 300, 11
ASLEEP = 0.1  # seconds after which OpenMP's threads wait awake no more


class Sides:
    """A model in training on a thread of its own."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int, steps: int) -> None:
        layers = [layer for a, b in pairwise(WIDTHS) for layer in (nn.Linear(a, b), nn.ReLU())]
        self._model = nn.Sequential(*layers[:-1])
        self._optimizer = torch.optim.SGD(self._model.parameters(), **HYPER)
        self._batch = (torch.randn(BATCH, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (BATCH,)))
        self._pool, self._steps = pool, steps
        self.rounds: list[dict[str, float]] = []
        pool.submit(set_threads_here, threads).result()

    def round(self) -> None:
        end_idle_openmp_threads()
        alone = self._pool.submit(self._seconds).result()
        torch.ones(1 << 20).add_(1.0)
        time.sleep(ASLEEP)
        beside = self._pool.submit(self._seconds).result()
        self.rounds.append({"alone": alone, "beside": beside})

    def _seconds(self) -> float:
        """Per step."""
        begin = time.perf_counter()
        for _ in range(self._steps):
            plain_step(self._model, self._optimizer, self._batch)
        return (time.perf_counter() - begin) / self._steps


def test_idle_threads(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    quick = request.config.getoption("quick")
    threads = max(2, len(os.sched_getaffinity(0)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(1) as pool:
            sides = Sides(pool, threads, 2 if quick else STEPS)
            benchmark.pedantic(sides.round, rounds=2 if quick else ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(before)
    rounds = sides.rounds[1:]
    benchmark.extra_info.update(
        kind="idle_threads",
        threads=threads,
        widths=list(WIDTHS),
        batch_size=BATCH,
        ms={name: quartiles([1e3 * each[name] for each in rounds]) for name in ("alone", "beside")},
        ratio=quartiles([each["beside"] / each["alone"] for each in rounds]),
    )
    print("  beside idle threads / without:", round(benchmark.extra_info["ratio"]["median"], 2))
