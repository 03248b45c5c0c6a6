"""What a run costs beside its training steps."""

from __future__ import annotations

from benchmarks.reports.goals import Goal, of_ratios
from benchmarks.reports.markdown import NOT_MEASURED, goal_of, load, origin, spread, table


def section() -> list[str]:
    results = load("overhead")
    heading = "**Metrics, progress, checkpoints and validation** (medians; ratios within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    milliseconds = [
        [name, spread({key: 1e3 * q[key] for key in ("median", "q1", "q3")}, 1)]
        for name, q in results["seconds_per_batch"].items()
    ]
    ratios = [[f"{r['of']} / {r['to']}", spread(r, 3), goal_of(r)] for r in results["ratios"]]
    case = (
        f"{s['model']}, K = {s['stages']}, batch {s['batch_size']}, {s['batches']} batches (on the way: "
        f"every {s['every']}), {s['validation_batches']} to validate"
    )
    return [
        heading,
        "",
        *table([case, "milliseconds per batch"], milliseconds),
        *table(["ratio", "measured", "goal"], ratios),
        *origin(results),
    ]


def goals() -> list[Goal]:
    results = load("overhead")
    if results is None:
        return [Goal("metrics, progress, checkpoints and validation", "at most 1.02 of without")]
    return of_ratios(results["settings"]["model"], results["ratios"])
