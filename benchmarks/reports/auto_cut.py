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
    once, seconds = results["first_round"], results["seconds_per_batch"]
    rows = [
        [
            f"{cut} (automatic)" if int(cut) == results["automatic"] else cut,
            f"{once[cut]:.3f}",
            spread(seconds[cut], 3) if cut in seconds else "",
        ]
        for cut in once
    ]
    ratio = results["ratio"]
    case = f"{s['model']}, K = {s['stages']}, batch {s['batch_size']}: second stage begins at child"
    return [
        heading,
        "",
        f"Every cut trained {s['batches']} batches once, fill and drain included; those within "
        f"{s['near']:g} of the fastest and the automatic one did so in {ratio['n']} more rounds.",
        "",
        *table([case, "seconds per batch, once", "in the further rounds"], rows),
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
