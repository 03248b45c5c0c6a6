"""Plans beside what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.harness import quartiles
from benchmarks.reports.drawing import BLUE, GREY, bare, sheet
from benchmarks.reports.goals import Goal
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def section() -> list[str]:
    results = load("plan")
    heading = "**Plans beside what happened** (a tick; medians, quartiles in brackets)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    ratios = [row["ratio"]["median"] for row in results["rows"]]
    below = sum(ratio < 1 for ratio in ratios)
    rows = []
    for row in results["rows"]:
        predicted, real = (1e3 * row[name]["median"] for name in ("predicted", "real"))
        rows.append(
            [
                row["model"],
                str(row["stages"]),
                f"{predicted:.0f}",
                f"{real:.0f}",
                spread(row["ratio"], 3),
                f"within {row['goal']:.0%}" + ("" if _holds(row) else ": missed"),
            ]
        )
    headings = ["model", "K", "predicted, ms", "real, ms", "predicted / real", "goal"]
    return [
        heading,
        "",
        "![predicted and real milliseconds per tick](results/plan.png)",
        "",
        *table(headings, rows),
        f"Predicted / real is the median within rounds. {below} of {len(rows)} are below 1, and their "
        f"median is {quartiles(ratios)['median']:.3f}. Plans here cut between children only, and K = 1 "
        "is the runner's plain training, which keeps freed memory as K = 2 does: K = 2 is ahead of "
        "it by less than of plain torch in other tables, or not at all.",
        "",
        *origin(results),
    ]


def goals() -> list[Goal]:
    results = load("plan")
    if results is None:
        return [Goal("predicted / real tick", "within 10%")]
    rows = results["rows"]
    ratios = [row["ratio"]["median"] for row in rows]
    (limit,) = {row["goal"] for row in rows}
    held = sum(_holds(row) for row in rows)
    return [
        Goal(
            f"predicted / real tick, {len(rows)} plans",
            f"each within {limit:.0%}",
            f"{held} of {len(rows)} are; all are {min(ratios):.3f} to {max(ratios):.3f}",
            held == len(rows),
        )
    ]


def picture(results: dict[str, Any]) -> Figure:
    rows = results["rows"]
    figure = sheet(8, 0.9 + 0.44 * len(rows))
    axes = figure.subplots()
    for shift, name, color in ((-0.2, "predicted", GREY), (0.2, "real", BLUE)):
        quartiles = [row[name] for row in rows]
        axes.barh(
            [index + shift for index in range(len(rows))],
            [1e3 * q["median"] for q in quartiles],
            height=0.38,
            xerr=[
                [1e3 * (q["median"] - q["q1"]) for q in quartiles],
                [1e3 * (q["q3"] - q["median"]) for q in quartiles],
            ],
            color=color,
            capsize=2,
            label=name,
        )
    axes.set_yticks(range(len(rows)), [f"{row['model']}, K = {row['stages']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per tick (median, quartiles)")
    axes.legend(loc="lower right", frameon=False)
    bare(axes)
    return figure


def _holds(row: dict[str, Any]) -> bool:
    return bool(abs(row["ratio"]["median"] - 1) <= row["goal"])
