"""The fused update beside ``torch.optim.SGD``, on two parameter lists.

    pytest benchmarks/bench_fused_update.py --benchmark-json FILE

What follows a backward is timed, from fresh gradients on the parameters to new weights with ``.grad``
empty again; the gradients' memory is freed on neither side. ``fdg``: gradients collected, then the
update out of place into the next weight copy.
``torch``: ``step()`` in place, then ``zero_grad()``. Rounds take turns; ``speed_ratio`` is the figure
to read (goals: 0.95 and 2 beside ``torch fused``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from fdg_cuda import models
from fdg_cuda.flat import FlatMemory

Step = Callable[[], float]  # returns the seconds of what it timed

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MILLIONS = 36_500_000


def one_large() -> list[nn.Parameter]:
    """36.5 million float32 parameters in tensors of a wide network's sizes."""
    return [nn.Parameter(torch.randn(n)) for n in (MILLIONS // 2, MILLIONS // 4, MILLIONS // 4)]


def resnet56() -> list[nn.Parameter]:
    return list(models.build("resnet56").parameters())


LISTS = {"36.5M": one_large, "resnet56": resnet56}


def fused(parameters: list[nn.Parameter], threads: int) -> Step:
    memory = FlatMemory(parameters, 2, 0)
    hyper = np.array([[HYPER["lr"], HYPER["momentum"], HYPER["weight_decay"], 0.0, 1.0]])
    update = memory.cpu_sgd(hyper, threads)
    gradients = [torch.randn_like(leaf) for leaf in memory.leaves[0]]
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


def torch_sgd(parameters: list[nn.Parameter], threads: int, **kind: bool) -> Step:
    torch.set_num_threads(threads)
    optimizer = torch.optim.SGD(parameters, **HYPER, **kind)
    gradients = [torch.randn_like(parameter) for parameter in parameters]

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


CASES: dict[str, Callable[[list[nn.Parameter], int], Step]] = {
    "torch fused": lambda p, n: torch_sgd(p, n, fused=True),
    "torch foreach": lambda p, n: torch_sgd(p, n, foreach=True),
    "torch plain": lambda p, n: torch_sgd(p, n, foreach=False, fused=False),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("parameters", LISTS)
@pytest.mark.parametrize("other", CASES)
def test_update_beside(
    benchmark: BenchmarkFixture, parameters: str, threads: int, other: str
) -> None:
    """One of ours and one of theirs in turns; ``speed_ratio`` is theirs / ours in seconds."""
    mine = fused(LISTS[parameters](), threads)
    theirs = CASES[other](LISTS[parameters](), threads)
    repeats = 3 if parameters == "36.5M" else 20
    ratios: list[float] = []

    def timed(step: Step) -> float:
        time.sleep(0.01)  # OpenMP's threads go on spinning after their work
        return sum(step() for _ in range(repeats))

    def round_of_both() -> None:
        seconds = timed(mine)
        ratios.append(timed(theirs) / seconds)

    benchmark.pedantic(round_of_both, rounds=15, warmup_rounds=2)
    low, middle, high = statistics.quantiles(ratios[2:], n=4)
    benchmark.extra_info["speed_ratio"] = {"median": middle, "q1": low, "q3": high}
    print(f"  our speed / theirs: {middle:.2f} ({low:.2f} to {high:.2f})")
