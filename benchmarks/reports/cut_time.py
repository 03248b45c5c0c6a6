"""How long it takes from a model to its cut."""

from __future__ import annotations

from benchmarks.reports.goals import Goal
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table


def section() -> list[str]:
    results = load("cut_time")
    heading = "**From a model to its cut** (medians, quartiles in brackets)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = [
        [name, *(spread(q, 1) for q in parts.values()), f"below {results['goal']:g}"]
        for name, parts in results["models"].items()
    ]
    headings = ["model", "capture, s", "measure and cut, s", "all, s", "goal"]
    return [heading, "", *table(headings, rows), *origin(results)]


def goals() -> list[Goal]:
    results = load("cut_time")
    if results is None:
        return [Goal("from a model to its cut", "below 30 s")]
    limit = results["goal"]
    return [
        Goal(f"{name}: to its cut", f"below {limit:g} s", f"{seconds:.1f} s", seconds < limit)
        for name, parts in results["models"].items()
        for seconds in [parts["all"]["median"]]
    ]
