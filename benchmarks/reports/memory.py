"""What a stage holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.drawing import BLUE, GREEN, GREY, VERMILION, bare, sheet
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {  # the lowest of a bar first
    "weight_bytes": ("weight copies", VERMILION),
    "snapshot_bytes": ("epoch's snapshot", GREEN),
    "input_bytes": ("batches' inputs", GREY),
    "activation_bytes": ("batches' activations", BLUE),
}


def section() -> list[str]:
    results = load("memory")
    heading = "**Memory per stage**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = [
        [
            mode,
            str(row["stage"]),
            str(row["delay"]),
            f"{row['weight_copies']} ({row['weight_bytes'] / 1e6:.2f} MB)",
            f"{row['snapshot_bytes'] / 1e6:.2f} MB",
            f"{row['batches']} ({row['activation_bytes'] / 1e6:.0f} MB)",
            f"{row['input_bytes'] / 1e6:.1f} MB",
        ]
        for mode, stages in results["rows"].items()
        for row in stages
    ]
    headings = ["mode", "stage", "D_k", "weight copies", "epoch's snapshot"]
    headings += ["batches' activations", "batches' inputs"]
    times = [[mode, spread(q)] for mode, q in results["seconds_per_step"].items()]
    return [
        f"{heading}: {_case(results)}",
        "",
        "![what each stage holds in each mode](results/memory.png)",
        "",
        *table(headings, rows),
        *table(["mode", "seconds per step, fill and drain included"], times),
        *origin(results),
    ]


def picture(results: dict[str, Any]) -> Figure:
    modes = results["rows"]
    figure = sheet(9, 3.6)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, (mode, stages) in zip(panels, modes.items(), strict=True):
        below = [0.0] * len(stages)
        for key, (label, color) in PARTS.items():
            megabytes = [row[key] / 1e6 for row in stages]
            axes.bar(range(len(stages)), megabytes, bottom=below, color=color, label=label)
            below = [low + more for low, more in zip(below, megabytes, strict=True)]
        for index, total in enumerate(below):
            axes.annotate(
                f"{total:.0f}", (index, total), (0, 3), textcoords="offset points", ha="center"
            )
        axes.set_title(f'"{mode}"', loc="left", fontsize=10)
        axes.set_xticks(range(len(stages)), [f"stage {row['stage']}" for row in stages], fontsize=8)
        axes.margins(y=0.1)
        bare(axes)
    panels[0].set_ylabel("MB")
    # The legend in the order in which the parts lie on each other.
    handles, labels = panels[-1].get_legend_handles_labels()
    panels[-1].legend(handles[::-1], labels[::-1], fontsize=8, frameon=False)
    figure.suptitle(_case(results), fontsize=10, x=0.01, ha="left")
    return figure


def _case(results: dict[str, Any]) -> str:
    s = results["settings"]
    return f"{s['model']}, batch {s['batch_size']}, K = {s['stages']}, 3x32x32"
