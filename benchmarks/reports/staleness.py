"""How far delayed gradients point from fresh ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import quartiles
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table

TITLES = {"stash": "stash: weights of the forward", "current": "current: weights of the moment"}


def section() -> list[str]:
    """A row per K and mode."""
    results = load("staleness")
    heading = "**Staleness: degrees between the delayed gradient and the fresh one**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    rows = [
        [
            str(row["stages"]),
            f"`{row['mode']}`",
            *(
                spread(quartiles(degrees), 1) if degrees else ""
                for degrees in (
                    row["stage_degrees"][0],
                    row["stage_degrees"][-1],
                    row["net_degrees"],
                )
            ),
            f"diverged by batch {row['diverged']}"
            if row["last_losses"] is None
            else spread(row["last_losses"], 3),
        ]
        for row in results["rows"]
    ]
    pooled = f", averaged over {s['pooled']}x{s['pooled']} pixels" if s["pooled"] > 1 else ""
    return [
        heading,
        "",
        f"{s['model']} on {s['data']}{pooled}, batch {s['batch_size']}, {s['batches']} batches, lr "
        f"{s['lr']:g}, momentum {s['momentum']:g}, weight decay {s['weight_decay']:g}, beta 1, by the "
        f"reference. Delayed is what a stage's update uses; fresh is BP's gradient of the same batch "
        f"at the weights that all stages have at that moment. 0: nothing is stale; 90: they have "
        f"nothing to do with each other. Medians over every {s['every']}th batch with quartiles; the "
        f"loss is that of the last fifth of the batches. Shrinking (beta) changes the length of a "
        f"stage's gradient and not its direction; for the whole net it changes the angle, too.",
        "",
        "![staleness](results/staleness.png)",
        "",
        *table(["K", "mode", "stage 0", "last stage", "whole net", "training loss"], rows),
        "One run of each kind: that angles grow with the delay stands out, but which of two neighbours "
        "in the table is ahead, in angle or in loss, may be chance.",
        "",
        *origin(results),
    ]


def picture(results: dict[str, Any]) -> Figure:
    """Stages' angles against their delay, and the whole net's as training went; a column per mode."""
    modes = list(dict.fromkeys(row["mode"] for row in results["rows"]))
    figure, panels = plt.subplots(
        2, len(modes), figsize=(4.6 * len(modes), 6.2), sharey=True, sharex="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    counts = sorted({row["stages"] for row in results["rows"]})
    colors = {
        count: plt.colormaps["viridis"](0.9 * place / max(1, len(counts) - 1))
        for place, count in enumerate(counts)
    }
    for column, mode in enumerate(modes):
        upper, lower = panels[0][column], panels[1][column]
        for row in (row for row in results["rows"] if row["mode"] == mode):
            by_delay(upper, row, colors[row["stages"]])
            lower.plot(row["sampled"], row["net_degrees"], "-", color=colors[row["stages"]])
        lost = [r["stages"] for r in results["rows"] if r["mode"] == mode and r["diverged"]]
        if lost:
            text = f"diverged: K = {', '.join(map(str, lost))}"
            lower.text(0.97, 0.95, text, ha="right", va="top", transform=lower.transAxes)
        upper.set_title(TITLES.get(mode, mode), fontsize=10)
        upper.set_xlabel("delay of the stage, D = 2 (K-1-k) ticks")
        lower.set_xlabel("batches trained")
        for axes in (upper, lower):
            axes.axhline(90, color="#444444", linewidth=0.8, linestyle=":")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].set_ylabel("degrees, each stage")
    panels[1][0].set_ylabel("degrees, whole net")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def by_delay(axes: Axes, row: dict[str, Any], color: Any) -> None:
    if not row["net_degrees"]:
        return
    marks = [quartiles(degrees) for degrees in row["stage_degrees"]]
    middle = [q["median"] for q in marks]
    bounds = [
        [q["median"] - q["q1"] for q in marks],
        [q["q3"] - q["median"] for q in marks],
    ]
    label = f"K = {row['stages']}"
    axes.errorbar(row["delays"], middle, yerr=bounds, fmt="o-", ms=4, color=color, label=label)


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {"staleness": picture}
