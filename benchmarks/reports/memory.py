"""What a stage holds."""

from __future__ import annotations

from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table


def memory() -> list[str]:
    results = load("memory")
    heading = "**Memory per stage**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    # Files from before "replay" have neither inputs nor times.
    with_inputs = all("input_bytes" in row for rows in results["rows"].values() for row in rows)
    rows = [
        [
            mode,
            str(row["stage"]),
            str(row["delay"]),
            f"{row['weight_copies']} ({row['weight_bytes'] / 1e6:.2f} MB)",
            f"{row['snapshot_bytes'] / 1e6:.2f} MB",
            f"{row['batches']} ({row['activation_bytes'] / 1e6:.0f} MB)",
            *([f"{row['input_bytes'] / 1e6:.1f} MB"] if with_inputs else []),
        ]
        for mode, stages in results["rows"].items()
        for row in stages
    ]
    headings = ["mode", "stage", "D_k", "weight copies", "epoch's snapshot", "batches' activations"]
    headings += ["batches' inputs"] if with_inputs else []
    times = [[mode, spread(q)] for mode, q in results.get("seconds_per_step", {}).items()]
    case = f"{s['model']}, batch {s['batch_size']}, K = {s['stages']}, 3x32x32"
    return [
        f"{heading}: {case}",
        "",
        *table(headings, rows),
        *(table(["mode", "seconds per step, fill and drain included"], times) if times else []),
        *origin(results),
    ]
