"""Whole training steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.cuts import WORTH_CAPTURING
from benchmarks.reports.drawing import bars, sheet
from benchmarks.reports.goals import Goal, of_ratios
from benchmarks.reports.markdown import NOT_MEASURED, goal_of, load, origin, spread, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NOTES = [
    "The parts alone and at once are those of the cut between two blocks: `fdg` with that cut cannot be "
    "faster than they are. With `capture=True` it can be cut inside a block, which is measured where it "
    f"is predicted to be faster by {WORTH_CAPTURING - 1:.0%} or more.",
    "",
]


def section() -> list[str]:
    results = load("training_step")
    heading = "**Whole training steps** (medians, quartiles in brackets; ratios within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    seconds = [[name, spread(q)] for name, q in results["seconds_per_step"].items()]
    ratios = [[f"{r['of']} / {r['to']}", spread(r, 3), goal_of(r)] for r in results["ratios"]]
    return [
        heading,
        "",
        "![seconds per training step](results/training_step.png)",
        "",
        *NOTES,
        *table([case(results), "seconds per step"], seconds),
        *table(["ratio", "measured", "goal"], ratios),
        *origin(results),
    ]


def summary() -> list[str]:
    results = load("training_step")
    if results is None:
        return [f"**Whole training steps**: {NOT_MEASURED}.", ""]
    rows = [[name, spread(q)] for name, q in results["seconds_per_step"].items()]
    return [
        "**Whole training steps** on two cores (medians, quartiles in brackets)",
        "",
        *table([case(results), "seconds per step"], rows),
    ]


def goals() -> list[Goal]:
    results = load("training_step")
    if results is None:
        return [Goal("a whole training step of `fdg` beside BP", "faster")]
    return of_ratios(results["settings"]["model"], results["ratios"])


def picture(results: dict[str, Any]) -> Figure:
    figure = sheet(8, 0.8 + 0.42 * len(results["seconds_per_step"]))
    axes = figure.subplots()
    bars(axes, results["seconds_per_step"], ours="fdg")
    axes.set_title(case(results), loc="left", fontsize=10)
    axes.set_xlabel("seconds per step (median, quartiles)")
    return figure


def case(results: dict[str, Any]) -> str:
    s = results["settings"]
    layout = "channels_last" if s["channels_last"] else "contiguous"
    split = ", ".join(map(str, s["split"]))
    inside = f" (inside a block: {', '.join(s['points'])})" if s["points"] else ""
    return f"{s['model']}, batch {s['batch_size']}, 3x32x32, {layout}, cut at {split}{inside}"
