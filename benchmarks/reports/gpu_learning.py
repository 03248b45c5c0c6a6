"""What nets learn on a GPU."""

from __future__ import annotations

from benchmarks.reports.markdown import NOT_MEASURED, load, origin, table

COMMAND = "python -m benchmarks.gpu_learning --out benchmarks/results"


def section() -> list[str]:
    results = load("gpu_learning")
    heading = "**Learning on a GPU**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = []
    for name, row in results["summary"].items():
        error, above = row["test_error"], row["above_bp"]
        rows.append(
            [
                f"`{name}`",
                f"{100 * error['mean']:.2f} % (sd {100 * error['sd']:.2f}, n = {error['n']})",
                f"{100 * above['mean']:+.2f} (sd {100 * above['sd']:.2f})" if above else "",
            ]
        )
    case = f"{results['model']}, {results['data']}, {results['plan']['epochs']} epochs"
    return [
        heading,
        "",
        *table([case, "test error", "points above bp, same seeds"], rows),
        *origin(results),
    ]
