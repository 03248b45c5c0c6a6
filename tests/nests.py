"""Chains with nested inputs and targets, and batches for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from chains import CLASSES, FEATURES, mlp
from torch import Tensor, nn
from torch.nn import functional as F


class Pair(NamedTuple):
    """A named tuple of a loader's."""

    left: Tensor
    right: Any


class Take(nn.Module):
    """A first layer that takes its nested input apart, and the containers with it."""

    def __init__(self, take: Callable[[Any], Tensor], *, in_place: bool = False) -> None:
        super().__init__()
        self.take = take
        self.in_place = in_place

    def forward(self, nested: Any) -> Tensor:
        x = self.take(nested)
        return x.mul_(2) if self.in_place else x * 2


def _from_dict(nested: Any) -> Tensor:
    mask = nested.pop("mask")  # the taker may change the containers
    assert nested.pop("scale") == 0.5
    x: Tensor = nested["x"] * mask * 0.5
    return x


def _from_deep(nested: Any) -> Tensor:
    (first,), named = nested
    named.clear()
    x: Tensor = first["a"]
    return x


def _named(nested: Any) -> Tensor:
    assert type(nested) is Pair
    assert nested.right["deep"][1] == "words"
    x: Tensor = nested.left + nested.right["deep"][0]
    return x


# name: (from x and y to the nested input and target, first layer's take, target's way to y)
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], Any]] = {
    "dict": (
        lambda x, y: ({"x": x, "mask": (x > -1), "scale": 0.5}, y),
        _from_dict,
        lambda target: target,
    ),
    "tuples": (
        lambda x, y: ((x[:, :3], x[:, 3:].float()), (y, torch.ones(()).double())),
        lambda nested: torch.cat([nested[0], nested[1].double()], dim=1),
        lambda target: target[0],
    ),
    "deep": (
        lambda x, y: (([{"a": x}], OrderedDict(n=3, none=None)), {"labels": [y], "soft": x}),
        _from_deep,
        lambda target: target["labels"][0],
    ),
    "named": (
        lambda x, y: (Pair(x, {"deep": (x.flip(1), "words")}), Pair(y, None)),
        _named,
        lambda target: target.left,
    ),
    "one": (lambda x, y: ([x], [y]), lambda nested: nested[0], lambda target: target[0]),
}
Data = list[tuple[Any, Any]]
Loss = Callable[[Tensor, Any], Tensor]


def nested(kind: str, plain: list[tuple[Tensor, Tensor]]) -> tuple[nn.Sequential, Data, Loss]:
    """A chain of nine children that takes nested inputs of ``kind``, batches for it, its loss."""
    nest, take, labels = KINDS[kind]

    def loss(output: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(output, labels(target))

    # In place, so that a copy must be made: of the tensors, not only of what holds them.
    first = Take(take, in_place=kind == "one")
    return nn.Sequential(first, *mlp()), [nest(x, y) for x, y in plain], loss


assert FEATURES == 6, "the kinds cut inputs in halves"
assert CLASSES == 4


def taking_apart(target: dict[str, Tensor]) -> Tensor:
    """The labels, the only thing in ``target``, which is empty afterwards."""
    return target.pop("labels")
