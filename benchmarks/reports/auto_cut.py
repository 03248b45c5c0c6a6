"""The automatic cut beside all others."""

from __future__ import annotations

from benchmarks.reports.goals import Goal, at_most
from benchmarks.reports.markdown import NOT_MEASURED, goal_of, load, origin, spread, table


def section() -> list[str]:
    results = load("auto_cut")
    heading = "**The automatic cut beside all others** (medians; the ratio within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    names = {results["automatic"]: "automatic", results["best"]: "fastest of all"}
    if len(names) == 1:
        names = {results["best"]: "automatic, and fastest of all"}
    seconds = results["seconds_per_batch"]
    rows = [[f"{name}: {cut}", spread(seconds[str(cut)], 3)] for cut, name in names.items()]
    ratio = results["ratio"]
    case = f"{s['model']}, K = {s['stages']}, batch {s['batch_size']}: second stage begins at child"
    return [
        heading,
        "",
        *table([case, "seconds per batch"], rows),
        *table(
            ["ratio", "measured", "goal"],
            [["automatic / fastest", spread(ratio, 3), goal_of(ratio)]],
        ),
        *origin(results),
    ]


def goals() -> list[Goal]:
    results = load("auto_cut")
    name = "automatic cut / fastest of all cuts"
    if results is None:
        return [Goal(name, "at most 1.03")]
    ratio = results["ratio"]
    return [at_most(f"{results['settings']['model']}: {name}", ratio["median"], ratio["goal"])]
