"""A network whose gradients overflow in chosen batches, for tests of float16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from chains import CLASSES, FEATURES, Batch, batches
from torch import Tensor, nn

WIDTH = 12
SPLIT = [3, 6]


class Infinite(torch.autograd.Function):
    """The parameter itself, whose gradient is infinite in one element."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Tensor:  # type: ignore[override]
        error = error.clone()
        error.view(-1)[0] = math.inf
        return error


class Overflowing(nn.Module):
    """A bias whose gradient overflows in the given batches; what it passes down stays finite."""

    def __init__(self, at: Sequence[int] = ()) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if torch.is_grad_enabled():  # without: the first forward of replay
            bias = Infinite.apply(bias) if self.calls in self.at else bias
            self.calls += 1
        return x + bias


def overflowing(at: Sequence[int] = (), *, stage: int = 1) -> nn.Sequential:
    """Three stages if cut at SPLIT; the bias of ``stage`` overflows."""
    torch.manual_seed(1)
    biases = [Overflowing(at if stage == k else ()) for k in range(3)]
    return nn.Sequential(
        *(nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), biases[0]),
        *(nn.ReLU(), nn.Linear(WIDTH, WIDTH), biases[1]),
        *(nn.Tanh(), biases[2], nn.Linear(WIDTH, CLASSES)),
    )


def single(count: int = 12, last: int | None = 3) -> list[Batch]:
    return [(x.float(), y) for x, y in batches(count, last=last)]
