"""The fused update beside ``torch.optim.SGD``, and beside the memory's bandwidth.

    pytest benchmarks/bench_fused_update.py --benchmark-json FILE

Four sizes, each as few large tensors and as many small ones (those of a ResNet-56, all made larger or
smaller alike). What follows a backward is timed, from fresh gradients on the parameters to new
weights with ``.grad`` empty again; the gradients' memory is freed on neither side. Ours: gradients
collected, then the update out of place into the next weight copy. Theirs: ``step()`` in place, then
``zero_grad()``. Sides take turns; ``speed_ratio`` is theirs / ours in seconds within a round (goals
beside ``fused``: 0.95 where the memory decides, 2 for ResNet-56's own tensors).

``bandwidth_share``: what the update moves (it reads weight, momentum and gradient, and writes weight
and momentum: five numbers per parameter) per second, in shares of the memory's bandwidth. That is
measured with as many threads in the same round, over buffers beyond the caches: the fastest of
``a *= s`` (two numbers per element), ``a += s b`` (three) and the C library's ``memmove`` (two). None of
them fetches what it overwrites without being counted, as ``a = b + s c`` does. What fits into the
caches can be above 1.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.harness import quartiles
from fdg_cuda import models
from fdg_cuda.flat import FlatMemory

Step = Callable[[], float]  # returns the seconds of what it timed

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
RESNET56 = 853_018
SIZES = (10_000, 100_000, RESNET56, 36_500_000)
SERIAL = 100_000  # parameters up to which more threads are no matter
MOVED_BYTES = 5 * 4  # per float32 parameter
YARDSTICK_BYTES = {"scale": 2 * 4, "add": 3 * 4, "copy": 2 * 4}  # per float32 element
BUFFER_ELEMENTS = 1 << 25  # 128 MB
KINDS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@dataclass(frozen=True)
class Case:
    """``elements`` float32 parameters in ``"few"`` or ``"many"`` tensors."""

    elements: int
    tensors: str
    threads: int
    most_repeats: int = 100
    rounds: int = 11

    def __str__(self) -> str:
        return f"{self.elements}-{self.tensors}-{self.threads} threads"

    @property
    def goal(self) -> float | None:
        """The least ``speed_ratio`` beside ``fused``."""
        return {(SIZES[-1], "few"): 0.95, (RESNET56, "many"): 2.0}.get(
            (self.elements, self.tensors)
        )

    @property
    def repeats(self) -> int:
        """Steps timed as one."""
        return max(2, min(self.most_repeats, 20_000_000 // self.elements))

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(n)) for n in LISTS[self.tensors](self.elements)]


def few(elements: int) -> list[int]:
    """Three, as a wide network's are."""
    quarter = elements // 4
    return [elements - 2 * quarter, quarter, quarter]


def many(elements: int) -> list[int]:
    """As many as a ResNet-56 has."""
    own = [parameter.numel() for parameter in models.build("resnet56").parameters()]
    scale = elements / sum(own)
    return [max(1, round(scale * n)) for n in own]


LISTS = {"few": few, "many": many}
CASES = [
    Case(elements, tensors, threads)
    for elements, tensors, threads in product(SIZES, LISTS, (1, 2))
    if threads == 1 or elements > SERIAL
]


def ours(parameters: list[nn.Parameter], gradients: Sequence[Tensor], threads: int) -> Step:
    memory = FlatMemory(parameters, 2, 0)
    hyper = np.array([[HYPER["lr"], HYPER["momentum"], HYPER["weight_decay"], 0.0, 1.0]])
    update = memory.cpu_sgd(hyper, threads)
    copy = 0

    def step() -> float:
        nonlocal copy
        give(gradients, memory.leaves[copy])
        begin = time.perf_counter()
        memory.collect_gradients(copy)
        update.run_update(copy, 1 - copy, 0)
        seconds = time.perf_counter() - begin
        copy = 1 - copy
        _ = hyper  # the update reads it by address
        return seconds

    return step


def theirs(parameters: list[nn.Parameter], gradients: Sequence[Tensor], kind: str) -> Step:
    optimizer = torch.optim.SGD(parameters, **HYPER, **KINDS[kind])

    def step() -> float:
        give(gradients, parameters)
        begin = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


def give(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def timed(operation: Callable[[], object]) -> Step:
    def step() -> float:
        begin = time.perf_counter()
        operation()
        return time.perf_counter() - begin

    return step


def memmove(
    to: Tensor, source: Tensor, pool: ThreadPoolExecutor, threads: int
) -> Callable[[], object]:
    """On the threads of ``pool``, a part each."""
    share = -(-to.nbytes // threads)
    begins = range(0, to.nbytes, share)

    def part(begin: int) -> None:
        nbytes = min(share, to.nbytes - begin)
        ctypes.memmove(to.data_ptr() + begin, source.data_ptr() + begin, nbytes)

    return lambda: list(pool.map(part, begins))


def seconds_of(step: Step, repeats: int) -> float:
    """Per step."""
    time.sleep(0.01)  # OpenMP's threads go on spinning after their work
    return sum(step() for _ in range(repeats)) / repeats


class Sides:
    """Ours, theirs of every kind and the yardsticks of bandwidth, a round of each at a time."""

    def __init__(self, case: Case, buffer_elements: int, pool: ThreadPoolExecutor) -> None:
        self.case = case
        parameters = case.parameters()
        gradients = [torch.randn_like(parameter) for parameter in parameters]
        self.sides = {"ours": ours(case.parameters(), gradients, case.threads)}
        # They share the weights, whose values are no matter.
        self.sides |= {kind: theirs(parameters, gradients, kind) for kind in KINDS}
        a, b = torch.ones(buffer_elements), torch.ones(buffer_elements)
        self.yardsticks = {
            "scale": timed(lambda: a.mul_(1.0)),
            "add": timed(lambda: a.add_(b, alpha=1e-9)),
            "copy": timed(memmove(a, b, pool, case.threads)),
        }
        self.moved = {"ours": MOVED_BYTES * sum(map(Tensor.numel, parameters))}
        self.moved |= {name: n * buffer_elements for name, n in YARDSTICK_BYTES.items()}
        self.rounds: list[dict[str, float]] = []

    def round(self) -> None:
        seconds = {name: seconds_of(s, self.case.repeats) for name, s in self.sides.items()}
        self.rounds.append(
            seconds | {name: seconds_of(s, 2) for name, s in self.yardsticks.items()}
        )

    def results(self, warmups: int) -> dict[str, Any]:
        rounds = self.rounds[warmups:]
        rates = [{name: 1e-9 * n / r[name] for name, n in self.moved.items()} for r in rounds]
        return {
            "kind": "update",
            "elements": self.case.elements,
            "tensors": self.case.tensors,
            "threads": self.case.threads,
            "ms": quartiles([1e3 * r["ours"] for r in rounds]),
            "speed_ratio": {
                kind: quartiles([r[kind] / r["ours"] for r in rounds]) for kind in KINDS
            },
            "goal": self.case.goal,
            "gb_per_s": {name: quartiles([rate[name] for rate in rates]) for name in self.moved},
            "bandwidth_share": quartiles(
                [rate["ours"] / max(rate[name] for name in self.yardsticks) for rate in rates]
            ),
        }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize(
        "case",
        [Case(1000, name, 1, most_repeats=2, rounds=3) for name in LISTS] if quick else CASES,
        ids=str,
    )
    metafunc.parametrize("buffer_elements", [1000 if quick else BUFFER_ELEMENTS], ids=str)


def test_update(benchmark: BenchmarkFixture, case: Case, buffer_elements: int) -> None:
    warmups = 2
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with ThreadPoolExecutor(case.threads) as pool:
            sides = Sides(case, buffer_elements, pool)
            benchmark.pedantic(sides.round, rounds=case.rounds, warmup_rounds=warmups)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(sides.results(warmups))
    ratios = benchmark.extra_info["speed_ratio"]
    print("  our speed / theirs:", {kind: round(q["median"], 2) for kind, q in ratios.items()})
