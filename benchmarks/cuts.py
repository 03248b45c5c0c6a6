"""Where models are cut to be compared: between children for all, and inside them where that pays for
this runner's own stages."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from benchmarks.alone import machine
from benchmarks.steps import Batch
from fdg_cuda.cutting import best_cut
from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.layer_times import anew
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.precision import Precision
from fdg_cuda.staged_model import chain_of, lay_out

STAGES = 2
BETWEEN, INSIDE = "between children", "inside children"
# How many times as fast a step must be by what was measured.
WORTH_CAPTURING = 1.01
PATIENCE = 2.0  # of the measuring, in times the usual


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


def measured_cuts(model: nn.Sequential, batch: Batch) -> Cuts:
    """Where the runner's search cuts it, by what the pieces of the captured chain take here and now.

    Raises:
        ModelCaptureError: the chain cannot be captured.
    """
    chain = chain_of(model, capture=True)
    lay_out(chain, batch[0], Precision.FLOAT32)
    children = {}
    for number in range(1, len(model)):
        with suppress(ModelCaptureError):  # then nothing is cut there
            children[chain.cut_at(str(number))] = number
    runs_on = machine(STAGES, cpu_threads=STAGES)
    runs_on.patience = PATIENCE
    with anew():
        costs = runs_on.layer_costs(chain.layers, batch, cross_entropy)
        best = partial(
            best_cut,
            costs,
            runs_on.device_specs(chain.layers, batch, cross_entropy),
            runs_on.schedule,
            runs_on.mode,
            hops=runs_on.links(),
            update_seconds_per_byte=runs_on.update_seconds_per_byte(),
        )
    # Of the same times, so that what the machine did meanwhile is no difference.
    between, inside = best(allowed=list(children)), best(allowed=chain.allowed_cuts())
    split = [children[cut] for cut in between.split]
    predicted = {BETWEEN: between.longest, INSIDE: inside.longest}
    if between.longest < WORTH_CAPTURING * inside.longest:
        return Cuts(split, predicted=predicted)
    return Cuts(split, inside.split, [chain.point(cut) for cut in inside.split], predicted)


def said(cuts: dict[str, Any]) -> str:
    """:class:`Cuts` as a result file has them, for people."""
    split = ", ".join(map(str, cuts["split"]))
    return f"{split}; this runner's at {', '.join(cuts['points'])}" if cuts["points"] else split
