"""What nets learn on a GPU."""

from __future__ import annotations

from benchmarks.reports.learning import errors
from benchmarks.reports.markdown import NOT_MEASURED, load, origin

COMMAND = "python -m benchmarks.gpu_learning --out benchmarks/results"


def section() -> list[str]:
    results = load("gpu_learning")
    heading = "**Learning on a GPU**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    case = f"{results['model']}, {results['data']}, {results['plan']['epochs']} epochs"
    return [
        heading,
        "",
        *errors(case, results["summary"]),
        *origin(results),
    ]
