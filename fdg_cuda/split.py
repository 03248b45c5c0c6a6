"""The caller's own choice of where to cut a chain of layers into stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def check_cuts(
    split: Sequence[int] | None, split_points: Sequence[str] | None, stages: int
) -> None:
    """What can be said of them without the model.

    Raises:
        ValueError: both are given, or one of them does not name a place for each stage but the first.
    """
    if split is not None and split_points is not None:
        raise ValueError("split and split_points both say where to cut the model; give one of them")
    if split is not None:
        _listed("split", split, int, "layer numbers, such as [3, 7]", stages)
    if split_points is not None:
        example = "submodules' names, such as ['layer2', 'layer3.0']"
        _listed("split_points", split_points, str, example, stages)


def _listed(name: str, cuts: Sequence[T], kind: type[T], example: str, stages: int) -> list[T]:
    if isinstance(cuts, (str, int)) or not all(isinstance(cut, kind) for cut in cuts):
        raise ValueError(
            f"{name} must be a list of {example}, or None to measure where to cut; got {cuts!r}"
        )
    if len(cuts) != stages - 1:
        raise ValueError(
            f"{name} must name {stages - 1} of the layers, where stages 1, 2, ... begin (one less "
            f"than there are devices); got {list(cuts)}"
        )
    return list(cuts)


def check_split(split: Sequence[int], layers: int, stages: int) -> list[int]:
    """``split`` as a list, if it can cut ``layers`` layers into ``stages`` stages.

    Raises:
        ValueError: wrong number of indices, out of order, or out of range.
    """
    cuts = _listed("split", split, int, "layer numbers, such as [3, 7]", stages)
    if any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"split indices must increase; got {cuts}")
    if cuts and (cuts[0] < 1 or cuts[-1] >= layers):
        raise ValueError(
            f"split indices must lie between 1 and {layers - 1}, since the chain has {layers} "
            f"layers and every stage needs at least one; got {cuts}"
        )
    return cuts
