"""The speed of one GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_report import all_turns, missing
from benchmarks.reports.goals import Goal
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table

COMMAND = "python -m benchmarks.gpu --out benchmarks/results"


def section() -> list[str]:
    results = load("gpu")
    if results is None:
        return ["**Speed on a GPU**", "", NOT_MEASURED, ""]
    lines = [f"**Speed on a GPU**: {results['environment']['gpu']}", ""]
    for label, turns in all_turns(results):
        rows = [
            [name, spread(case["ms_per_step"]), f"{case['samples_per_s']['median']:.0f}"]
            for name, case in turns["cases"].items()
        ]
        lines += table([label, "milliseconds per step", "samples per second"], rows)
    lines += _updates(results)
    rows = [
        [
            goal["name"],
            f"{goal['measured']:.3g}",
            _wanted(goal) + ("" if goal["met"] else ": missed"),
        ]
        for goal in results["goals"]
    ]
    lines += table(["goal", "measured", "wanted"], rows)
    absent = [f"{name}: {why}" for name, why in missing(results).items()]
    lines += [f"Not measured: {'; '.join(absent)}.", ""] if absent else []
    return [*lines, *origin(results)]


def summary() -> list[str]:
    results = load("gpu")
    if results is None:
        return [f"**Speed on a GPU**: {NOT_MEASURED}.", ""]
    return [f"**Speed on a GPU**: measured on one {results['environment']['gpu']}.", ""]


def goals() -> list[Goal]:
    results = load("gpu")
    if results is None:
        return [Goal("`fdg` on one card beside BP", "faster")]
    return [
        Goal(goal["name"], _wanted(goal), f"{goal['measured']:.3g}", goal["met"])
        for goal in results["goals"]
    ]


def _updates(results: dict[str, Any]) -> list[str]:
    rows = [
        [f"{name}, {size} parameters", f"{case['gb_per_s']['median']:.0f}", share]
        for size, measured in results["sections"].get("update", {}).get("sizes", {}).items()
        for name, case in measured["cases"].items()
        for share in [f"{case['share_of_copy']['median']:.2f}"]
    ]
    return table(["update", "GB/s", "share of a copy's"], rows) if rows else []


def _wanted(goal: dict[str, Any]) -> str:
    return f"{goal['sense']} {goal['goal']:g}"
