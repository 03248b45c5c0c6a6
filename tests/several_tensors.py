"""Layers between which several tensors go."""

from __future__ import annotations

import torch
from chains import FEATURES
from torch import Tensor, nn


class Fork(nn.Module):
    """Hands its input on beside what it makes of it, and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), x, torch.arange(len(x))


class Handing(nn.Module):
    def forward(self, hop: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        one, two, order = hop
        return [one.sin(), two, order, two]  # which is one tensor still


class Join(nn.Module):
    def forward(self, hop: list[Tensor]) -> Tensor:
        one, two, order, again = hop
        assert again is two
        return (one * two)[order]
