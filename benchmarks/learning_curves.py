"""Learning curves: test error over the epochs, a panel per family of ways."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.learning_runs import Runs, Way, families

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#444444", "#D55E00", "#0072B2", "#009E73")  # which colour-blind readers can tell apart


def draw(title: str, runs: Runs, ways: Iterable[Way]) -> Figure:
    """Mean, least and largest over the seeds that did not diverge."""
    panels = families(ways)
    figure = Figure(figsize=(1.5 + 4.2 * len(panels), 4.4), dpi=130, layout="constrained")
    every_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, members) in zip(every_axes, panels.items(), strict=True):
        for way in members:
            _draw_way(axes, runs, way, COLORS[way.stages - 1])
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axes.grid(True, which="both", alpha=0.25)
        if axes.lines:
            axes.legend(fontsize=8)
    every_axes[0].set_ylabel("test error (%): mean and range over seeds")
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_way(axes: Axes, runs: Runs, way: Way, color: str) -> None:
    done = [run for run in runs.values() if run["way"] == way.name]
    curves = [
        [100 * row["test_error"] for row in run["epochs"]] for run in done if not run["diverged"]
    ]
    diverged = len(done) - len(curves)
    note = f", {diverged} diverged" if diverged else ""
    if not curves:
        if diverged:
            axes.plot([], [], color=color, label=f"{way.name}: none ended{note}")
        return
    columns = list(zip(*curves, strict=True))
    numbers = range(1, len(columns) + 1)
    mean = [statistics.fmean(column) for column in columns]
    label = f"{way.name}: {mean[-1]:.2f} % (n = {len(curves)}{note})"
    axes.plot(numbers, mean, color=color, label=label, marker="." if len(mean) < 30 else "")
    axes.fill_between(
        numbers, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15
    )
