"""What the ways of ``benchmarks.compare`` have trained. Imports little: processes begin with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from benchmarks.compare_cases import TINY, Case
from benchmarks.compare_processes import layout_trial
from benchmarks.compare_trainers import Place
from benchmarks.compare_ways import WAYS
from benchmarks.cuts import Cuts

(MODEL,) = TINY
CASE, SPLIT, COUNT = Case(MODEL, 16), [2], 3
States = dict[str, dict[str, Tensor]]


def place(folder: Path, rank: int = 0) -> Place:
    return Place(CASE, Cuts(SPLIT), rank, str(folder / "meeting"))


def trained(names: list[str], where: Place) -> States:
    """What the ways' trainers have after ``COUNT`` steps."""
    states = {}
    for name in names:
        trainer = WAYS[name].make(where)
        assert trainer.seconds_per_step(1, COUNT - 1) > 0
        states[name] = trainer.state()
    return states


def training(names: list[str], where: Place) -> Callable[[], tuple[States, float]]:
    """The same as a player's turn, and the trial of a layout behind it."""
    return lambda: (trained(names, where), layout_trial(where)())
