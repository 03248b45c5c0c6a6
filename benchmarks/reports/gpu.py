"""All that was measured on a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_report import all_turns, missing
from benchmarks.reports.learning import errors
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table


def gpu() -> list[str]:
    results = load("gpu")
    if results is None:
        return ["**GPU**: " + NOT_MEASURED + ".", "", *gpu_learning()]
    lines = [f"**GPU**: {results['environment']['gpu']}", ""]
    for label, turns in all_turns(results):
        rows = [
            [name, spread(case["ms_per_step"]), f"{case['samples_per_s']['median']:.0f}"]
            for name, case in turns["cases"].items()
        ]
        lines += table([label, "milliseconds per step", "samples per second"], rows)
    lines += gpu_updates(results)
    goals = [
        [goal["name"], f"{goal['measured']:.3g}", gpu_goal_of(goal)] for goal in results["goals"]
    ]
    lines += table(["goal", "measured", "wanted"], goals)
    absent = [f"{name}: {why}" for name, why in missing(results).items()]
    lines += [f"Not measured: {'; '.join(absent)}.", ""] if absent else []
    return [*lines, *origin(results), *gpu_learning()]


def gpu_updates(results: dict[str, Any]) -> list[str]:
    rows = [
        [f"{name}, {size} parameters", f"{case['gb_per_s']['median']:.0f}", share]
        for size, measured in results["sections"].get("update", {}).get("sizes", {}).items()
        for name, case in measured["cases"].items()
        for share in [f"{case['share_of_copy']['median']:.2f}"]
    ]
    return table(["update", "GB/s", "share of a copy's"], rows) if rows else []


def gpu_goal_of(goal: dict[str, Any]) -> str:
    return f"{goal['sense']} {goal['goal']:g}" + ("" if goal["met"] else ": missed")


def gpu_learning() -> list[str]:
    results = load("gpu_learning")
    if results is None:
        return []
    case = f"{results['model']}, {results['data']}, {results['plan']['epochs']} epochs"
    return [
        "**Learning on a GPU**",
        "",
        *errors(case, results["summary"]),
        *origin(results),
    ]
