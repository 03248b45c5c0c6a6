"""The largest learning rate with which training is stable, on a grid of powers of the root of 2.

A rate is *stable* if short training with it stays finite, and the mean loss of its last eighth is
below ``LEARNS`` of what guessing gives, the logarithm of the number of classes. Batch norm keeps the
loss of a net finite whose weights have long run away, so that finite losses alone say little; but such
a net does not stay below guessing, whose loss is that of an untrained one. Training is constant in its
rate, but for a warm-up in its first eighth.

The grid is bisected, so stability is assumed to end once: a rate below one that was found stable is
not tried, nor is one above one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

FROM, STEPS = 0.05, 15
GRID = tuple(FROM * 2 ** (step / 2) for step in range(STEPS))  # 0.05 to 6.4
LEARNS = 0.9
PART = 8  # this part of the updates warms up, and this part is judged


def search(
    losses_with: Callable[[float], Sequence[float] | None],
    classes: int,
    grid: Sequence[float] = GRID,
) -> dict[str, Any]:
    """The largest stable rate of ``grid`` (None: not even its first is), and what was tried.

    Args:
        losses_with: trains anew with a rate: the loss of each batch, or None if one was not finite.
    """
    probes = []
    stable, unstable = -1, len(grid)
    while unstable - stable > 1:
        middle = (stable + unstable) // 2
        probes.append(probe := judged(grid[middle], losses_with(grid[middle]), classes))
        if probe["stable"]:
            stable = middle
        else:
            unstable = middle
    largest = grid[stable] if stable >= 0 else None
    return {"largest": largest, "grid": [grid[0], grid[-1]], "probes": probes}


def judged(lr: float, losses: Sequence[float] | None, classes: int) -> dict[str, Any]:
    """Whether training with ``lr`` is stable, and the mean loss that says so."""
    if losses is None:
        return {"lr": lr, "stable": False, "last_loss": None}
    last = statistics.fmean(losses[-max(1, len(losses) // PART) :])
    return {"lr": lr, "stable": last < LEARNS * math.log(classes), "last_loss": last}
