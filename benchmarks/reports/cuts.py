"""The automatic cut and the plan."""

from __future__ import annotations

from benchmarks.reports.markdown import NOT_MEASURED, goal_of, load, origin, spread, table


def auto_cut() -> list[str]:
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


def cut_time() -> list[str]:
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


def plans() -> list[str]:
    results = load("plan")
    heading = "**Plans beside what happened** (a tick; medians, quartiles in brackets)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = []
    for row in results["rows"]:
        predicted, real = (1e3 * row[name]["median"] for name in ("predicted", "real"))
        off = abs(row["ratio"]["median"] - 1)
        verdict = "" if off <= row["goal"] else ": missed"
        rows.append(
            [
                row["model"],
                str(row["stages"]),
                f"{predicted:.0f}",
                f"{real:.0f}",
                spread(row["ratio"], 3),
                f"within {row['goal']:.0%}{verdict}",
            ]
        )
    headings = ["model", "K", "predicted, ms", "real, ms", "predicted / real", "goal"]
    return [heading, "", *table(headings, rows), *origin(results)]
