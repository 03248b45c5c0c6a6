"""Whole training steps, and what a run costs beside them."""

from __future__ import annotations

from benchmarks.reports.markdown import NOT_MEASURED, goal_of, load, origin, spread, table


def training_step() -> list[str]:
    results = load("training_step")
    heading = "**Whole training steps** (medians, quartiles in brackets; ratios within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    layout = "channels_last" if s["channels_last"] else "contiguous"
    seconds = [[name, spread(q)] for name, q in results["seconds_per_step"].items()]
    ratios = [[f"{r['of']} / {r['to']}", spread(r, 3), goal_of(r)] for r in results["ratios"]]
    case = f"{s['model']}, batch {s['batch_size']}, 3x32x32, {layout}"
    return [
        heading,
        "",
        *table([case, "seconds per step"], seconds),
        *table(["ratio", "measured", "goal"], ratios),
        *origin(results),
    ]


def overhead() -> list[str]:
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
