"""A small model with skips, dropout and shared buffers, and a runner of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(torch.relu(self.norm(x)), 0.2, training=self.training)
        return x + self.inner(y)


class Residual(nn.Module):
    """Skips, dropout by mode, and a buffer that all blocks read and ``state_dict`` leaves out."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * self.scale
        return self.head(x)


def data_of(count: int = 6, *, size: int = 5, last: int = 3) -> list[tuple[Tensor, Tensor]]:
    sizes = [size] * (count - 1) + [last]
    return [(torch.randn(n, 6), torch.randint(0, 4, (n,))) for n in sizes]


def residual(stages: int = 2, **options: Any) -> FDGRunner:
    torch.manual_seed(1)
    points = [f"blocks.{k}" for k in range(1, stages)]
    return FDGRunner(
        Residual(), ["cpu"] * stages, **{"split_points": points, "lr": 0.05, **options}
    )
