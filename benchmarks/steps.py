"""A whole training step: in plain torch, and of a runner in its steady state."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner

HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward, update."""
    x, y = batch
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(x), y))
    optimizer.step()


# Steps of every new fit, behind the fill, that are slower: the memory that was given back at the end of
# the fit before has to be asked for again.
SETTLING = 8


class SteadyRunner:
    """Times a runner with every stage at work, from one batch's loss to the next.

    Args:
        make: a runner, with the loss function it is given; all its stages on the CPU.
        batch: what it is trained on.
    """

    def __init__(self, make: Callable[[LossFunction], FDGRunner], batch: Batch) -> None:
        self._done: list[float] = []
        self._batch = batch
        self.runner = make(self._loss)

    def seconds(self, warm_up: int, count: int) -> list[float]:
        """Of ``count`` steps, after ``warm_up`` more than a new fit takes to settle."""
        self._done.clear()
        stages, latency = self.runner.schedule.stages, self.runner.schedule.latency
        self.runner.fit([self._batch] * self.batches(warm_up, count))
        # The last stage sees batch b at tick b+K-1 (fdg) or b (ddg). All stages are at work from the
        # tick in which stage 0 first has a backward until the last in which it has a forward.
        assert latency in (stages - 1, 2 * stages - 2), "fdg or ddg"
        first = stages - 1 + SETTLING + warm_up
        return [b - a for a, b in pairwise(self._done[first : first + count + 1])]

    def batches(self, warm_up: int, count: int) -> int:
        """How many :meth:`seconds` trains."""
        return self.runner.schedule.latency + SETTLING + warm_up + count + 1

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        self._done.append(time.perf_counter())
        return F.cross_entropy(output, target)
