"""What nets learn."""

from __future__ import annotations

from benchmarks.reports.markdown import NOT_MEASURED, load, origin, table


def section() -> list[str]:
    results = load("learning")
    heading = "**Learning**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    rows = [
        [
            f"`{method}`" + (", K = 2" if method != "bp" else ""),
            *(f"{100 * epoch['test_accuracy']:.2f} %" for epoch in run["epochs"]),
        ]
        for method, run in results["runs"].items()
    ]
    epochs = [f"epoch {number + 1}" for number in range(s["epochs"])]
    case = f"{s['data']}, {s['model']}, seed {s['seed']}: test accuracy"
    return [heading, "", *table([case, *epochs], rows), *origin(results)]


def summary() -> list[str]:
    return section()
