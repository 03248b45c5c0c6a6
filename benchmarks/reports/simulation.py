"""How long it takes to predict an epoch of very many stages."""

from __future__ import annotations

from benchmarks.reports.goals import Goal, at_most
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table


def section() -> list[str]:
    results = load("simulation")
    heading = "**Simulated epochs** (medians, quartiles in brackets)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    rows = [
        [
            f"`{row['method']}`, as on {row['layout']} devices",
            spread(row),
            f"at most {row['goal']:g}" + (": missed" if row["median"] > row["goal"] else ""),
        ]
        for row in results["rows"]
    ]
    case = f"K = {s['stages']:,}, {s['ticks']:,} ticks"
    return [heading, "", *table([case, "seconds of one core", "goal"], rows), *origin(results)]


def goals() -> list[Goal]:
    results = load("simulation")
    if results is None:
        return [Goal("K = 1,024, 10,000 ticks simulated", "at most 8 s")]
    case = f"K = {results['settings']['stages']:,} simulated"
    slowest = max(results["rows"], key=lambda row: float(row["median"]))
    name = f"{case}, the slowest (`{slowest['method']}`, {slowest['layout']})"
    return [at_most(name, slowest["median"], slowest["goal"], 2, "s")]
