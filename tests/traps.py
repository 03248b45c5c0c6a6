"""A chain, a loss and a loader that raise where a test wants them to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from chains import Batch, batches, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from versions import (
    runner_of,
)

from fdg_cuda import FDGRunner


class TroubleError(Exception):
    """Raised by the user's code."""


class Trap(nn.Module):
    """Passes its input on, until the forward or backward of batch ``at`` raises."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_at = self.backward_at = -1
        self.batch = 0

    def forward(self, x: Tensor) -> Tensor:
        batch, self.batch = self.batch, self.batch + 1
        if batch == self.forward_at:
            raise_in_user_code(f"forward {batch}")
        result: Tensor = TrappedIdentity.apply(x, batch == self.backward_at)
        return result


class TrappedIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, raises: bool) -> Tensor:
        ctx.raises = raises
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.raises:
            raise_in_user_code("backward")
        return gradient, None


def raise_in_user_code(where: str) -> None:
    raise TroubleError(where)


class TrappedLoss:
    def __init__(self) -> None:
        self.at = -1
        self.batch = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        batch, self.batch = self.batch, self.batch + 1
        if batch == self.at:
            raise_in_user_code(f"loss {batch}")
        return F.cross_entropy(output, target)


class TrappedLoader:
    def __init__(self, data: list[Batch]) -> None:
        self.data = data
        self.at = -1

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.data):
            if number == self.at:
                raise_in_user_code(f"loader {number}")
            yield batch


class Scene:
    """A chain with a trap in the middle of each of three stages, a loss and a loader with traps."""

    split = (4, 8)

    def __init__(self, count: int = 7) -> None:
        layers = list(mlp(layers=9))
        self.traps = [Trap(), Trap(), Trap()]
        for position, trap in zip((8, 5, 2), reversed(self.traps), strict=True):
            layers.insert(position, trap)
        self.model = nn.Sequential(*layers)
        self.loss = TrappedLoss()
        self.loader = TrappedLoader(batches(count))

    def runner(self, model: nn.Sequential | None = None, **options: Any) -> FDGRunner:
        settings = {"split": list(self.split), "loss_fn": self.loss, **options}
        return runner_of(self.model if model is None else model, 3, **settings)

    def set(self, place: str, batch: int) -> None:
        kind, _, stage = place.partition(" ")
        if kind == "forward":
            self.traps[int(stage)].forward_at = batch
        elif kind == "backward":
            self.traps[int(stage)].backward_at = batch
        else:
            {"loss": self.loss, "loader": self.loader}[kind].at = batch

    def disarm(self) -> None:
        for trap in self.traps:
            trap.forward_at = trap.backward_at = -1
        self.loss.at = self.loader.at = -1
