"""The caller's own choice of where to cut a chain of layers into stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def check_split(split: Sequence[int], layers: int, stages: int) -> list[int]:
    """``split`` as a list, if it can cut ``layers`` layers into ``stages`` stages.

    Raises:
        ValueError: wrong number of indices, out of order, or out of range.
    """
    if isinstance(split, (str, int)) or not all(isinstance(index, int) for index in split):
        raise ValueError(
            f"split must be a list of layer numbers, such as [3, 7], or None to measure "
            f"where to cut; got {split!r}"
        )
    cuts = list(split)
    if len(cuts) != stages - 1:
        raise ValueError(
            f"split must name {stages - 1} of the layers, where stages 1, 2, ... begin (one less "
            f"than there are devices); got {cuts}"
        )
    if any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"split indices must increase; got {cuts}")
    if cuts and (cuts[0] < 1 or cuts[-1] >= layers):
        raise ValueError(
            f"split indices must lie between 1 and {layers - 1}, since the chain has {layers} "
            f"layers and every stage needs at least one; got {cuts}"
        )
    return cuts
