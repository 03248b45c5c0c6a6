"""What :mod:`benchmarks.compare` trains: chains of layers, which every way can cut at the same place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.steps import Batch
from fdg_cuda import models

CLASSES = 10


@dataclass(frozen=True)
class Model:
    """A chain, a sample's shape, and what it is, for people. ``convolutional``: runs in channels_last
    where the way can."""

    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    what: str
    convolutional: bool = False
    batch_norm: bool = False


class Classifier(nn.Module):
    """The mean over a sequence's tokens, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.mean(1))
        return logits


def transformer(width: int = 128, layers: int = 6) -> nn.Sequential:
    """An encoder that classifies sequences. Without dropout: all ways compute the same."""
    blocks = [
        nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout=0.0, batch_first=True)
        for _ in range(layers)
    ]
    return nn.Sequential(*blocks, Classifier(width))


def tiny() -> nn.Sequential:
    """Convolutions, but no batch norm: micro-batches then give the whole batch's gradients."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, CLASSES)),
    )


IMAGE = (3, 32, 32)
MODELS = {
    **{
        name: Model(
            partial(models.build, name),
            IMAGE,
            "32x32 images",
            convolutional=True,
            batch_norm=True,
        )
        for name in ("resnet20", "resnet56", "wrn16-4")
    },
    "mlp": Model(
        partial(models.mlp, hidden=(1024,) * 6),
        IMAGE,
        "six hidden layers, 1,024 wide, 32x32 images",
    ),
    "transformer": Model(transformer, (32, 128), "six layers, 128 wide, 32 tokens"),
}
TINY = {"tiny": Model(tiny, (3, 8, 8), "8x8 images", convolutional=True)}
EVERY_MODEL = {**MODELS, **TINY}


@dataclass(frozen=True)
class Case:
    """A model, by name, and its batch."""

    name: str
    batch_size: int

    @property
    def model(self) -> Model:
        return EVERY_MODEL[self.name]

    def chain(self, *, channels_last: bool) -> nn.Sequential:
        """The same weights at every call. ``channels_last``: if it is convolutional."""
        torch.manual_seed(0)
        chain = self.model.make()
        if channels_last and self.model.convolutional:
            chain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return chain

    def batch(self, *, channels_last: bool) -> Batch:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch_size, *self.model.shape, generator=generator)
        y = torch.randint(0, CLASSES, (self.batch_size,), generator=generator)
        if channels_last and self.model.convolutional:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y
