"""Where :mod:`benchmarks.compare` cuts: between children for all, and inside them where that pays for
this runner's own stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.alone import machine
from benchmarks.compare_cases import STAGES, Case
from fdg_cuda.layer_times import anew
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.precision import Precision
from fdg_cuda.staged_model import chain_of, lay_out

BETWEEN, INSIDE = "between children", "inside children"
# How many times as fast a step must be by what was measured, which varies by some percent.
WORTH_CAPTURING = 1.05


@dataclass(frozen=True)
class Cuts:
    """Where the second stage, ... begins.

    Attributes:
        split: with which children: of every pipeline.
        inside: with which pieces of the captured chain (``capture=True``): where this runner's own
            stages begin instead; empty: at ``split`` too.
        points: what begins there, for people; empty likewise.
        predicted: seconds of a step of each kind of cut.
    """

    split: list[int]
    inside: list[int] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)


def measured_cuts(case: Case) -> Cuts:
    """Where the runner cuts it, by what its layers, and those of the captured chain, take here and now.

    Raises:
        ModelCaptureError: the chain cannot be captured.
    """
    batch = case.batch(channels_last=True)
    chains = {
        kind: chain_of(case.chain(channels_last=True), capture=kind == INSIDE)
        for kind in (BETWEEN, INSIDE)
    }
    with anew():
        found = {}
        for kind, chain in chains.items():
            lay_out(chain, batch[0], Precision.FLOAT32)
            found[kind] = machine(STAGES).best_cut(chain, batch, cross_entropy)
    predicted = {kind: cut.longest for kind, cut in found.items()}
    split, inside = found[BETWEEN].split, found[INSIDE].split
    if predicted[BETWEEN] < WORTH_CAPTURING * predicted[INSIDE]:
        return Cuts(split, predicted=predicted)
    return Cuts(split, inside, [chains[INSIDE].point(cut) for cut in inside], predicted)


def said(cuts: dict[str, Any]) -> str:
    """:class:`Cuts` as a result file has them, for people."""
    split = ", ".join(map(str, cuts["split"]))
    return f"{split}; this runner's at {', '.join(cuts['points'])}" if cuts["points"] else split
