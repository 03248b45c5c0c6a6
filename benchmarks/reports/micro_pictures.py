"""Pictures of the runtime's parts by themselves, and what their cases are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reports.markdown import NOT_MEASURED

Case = dict[str, Any]  # what a benchmark left in its extra_info

KINDS = ("plain", "foreach", "fused")  # of torch.optim.SGD
STEPS = ("forward", "backward", "update")
WORKS = {"native": "native", "python": "Python"}
COLORS = ("#5b8fc9", "#e07b54", "#b9b9b9")


def of_kind(results: dict[str, Any] | None, kind: str) -> list[Case]:
    """What was measured of ``kind``, in the order of measuring."""
    benchmarks = [] if results is None else results["benchmarks"]
    return [b["extra_info"] for b in benchmarks if b["extra_info"].get("kind") == kind]


def parameters(count: int) -> str:
    """``36.5 M``."""
    return f"{count / 1e6:.3g} M" if count >= 5e5 else f"{count / 1e3:.3g} k"


def threads_of(count: int) -> str:
    """``2 threads``."""
    return f"{count} thread{'s' * (count > 1)}"


def scheduler(cases: Sequence[Case]) -> Figure:
    """Cost per stage and tick against K."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for color, (work, name) in zip(COLORS, WORKS.items(), strict=False):
        own = sorted((case for case in cases if case["work"] == work), key=lambda c: c["stages"])
        marks = [case["per_stage_and_tick_us"] for case in own]
        low, middle, high = ([q[key] for q in marks] for key in ("q1", "median", "q3"))
        counts = [case["stages"] for case in own]
        axes.plot(counts, middle, "o-", color=color, label=f"empty {name} actions")
        axes.fill_between(counts, low, high, color=color, alpha=0.25, linewidth=0)
    counts = sorted({case["stages"] for case in cases})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stages K")
    axes.set_ylabel("µs per stage and tick")
    tidy(axes)
    axes.legend(frameon=False)
    return figure


def update(cases: Sequence[Case]) -> Figure:
    """Speed ratios as bars, a panel per number of threads."""
    threads = sorted({case["threads"] for case in cases})
    widths = [1 + sum(case["threads"] == count for case in cases) for count in threads]
    figure, panels = plt.subplots(
        1,
        len(threads),
        figsize=(0.9 * sum(widths), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
    )
    for axes, count in zip(panels[0], threads, strict=True):
        own = [case for case in cases if case["threads"] == count]
        for position, kind in enumerate(KINDS):
            ratios = [case["speed_ratio"][kind] for case in own]
            middle = [q["median"] for q in ratios]
            spread = [[m - q["q1"] for m, q in zip(middle, ratios, strict=True)]]
            spread += [[q["q3"] - m for m, q in zip(middle, ratios, strict=True)]]
            places = [place + 0.27 * (position - 1) for place in range(len(own))]
            color, label = COLORS[position], f"torch {kind}"
            axes.bar(places, middle, 0.25, yerr=spread, color=color, label=label)
        axes.axhline(1, color="#444444", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        labels = [f"{parameters(case['elements'])}\n{case['tensors']}" for case in own]
        axes.set_xticks(range(len(own)), labels)
        axes.set_title(threads_of(count), fontsize=10)
        tidy(axes)
    axes = panels[0][0]
    axes.set_ylabel("our speed / theirs")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(KINDS), frameon=False)
    return figure


def stages(cases: Sequence[Case]) -> Figure:
    """Milliseconds per batch of every stage, stacked, a panel per net."""
    nets = list(dict.fromkeys((case["model"], case["batch_size"]) for case in cases))
    figure, panels = plt.subplots(
        1, len(nets), figsize=(4.2 * len(nets), 3.4), squeeze=False, layout="constrained"
    )
    for axes, (model, batch_size) in zip(panels[0], nets, strict=True):
        bars(axes, [case for case in cases if case["model"] == model])
        axes.set_title(f"{model}, batch {batch_size}", fontsize=10)
        tidy(axes)
    panels[0][0].set_ylabel("ms per batch")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STEPS), frameon=False)
    return figure


def bars(axes: Axes, cases: Sequence[Case]) -> None:
    """One per stage, in groups of a cut each."""
    places: list[float] = []
    rows: list[Case] = []
    for case in cases:
        begin = places[-1] + 1.8 if places else 0.0
        places += [begin + number for number in range(len(case["rows"]))]
        rows += case["rows"]
    height = [0.0] * len(rows)
    for color, name in zip(COLORS, STEPS, strict=True):
        parts = [row[f"{name}_ms"]["median"] for row in rows]
        axes.bar(places, parts, 0.85, bottom=height, color=color, label=name)
        height = [below + part for below, part in zip(height, parts, strict=True)]
    axes.set_xticks(places, [str(row["stage"]) for row in rows])
    axes.set_xlabel("stage, of K = " + ", ".join(str(case["stages"]) for case in cases))


def tidy(axes: Axes) -> None:
    """Without a frame."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def picture(kind: str, draw: Callable[[Sequence[Case]], Figure], results: dict[str, Any]) -> Figure:
    """What ``draw`` makes of the cases of ``kind``, if there are any."""
    cases = of_kind(results, kind)
    if cases:
        return draw(cases)
    figure, axes = plt.subplots(figsize=(4, 1))
    axes.text(0.5, 0.5, f"{kind}: {NOT_MEASURED}", ha="center", va="center")
    axes.set_axis_off()
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "micro_stages": partial(picture, "stage", stages),
    "micro_scheduler": partial(picture, "scheduler", scheduler),
    "micro_update": partial(picture, "update", update),
}
