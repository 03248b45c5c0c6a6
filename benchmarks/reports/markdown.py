"""Markdown out of a benchmark's result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

NOT_MEASURED = "not measured yet"


def file_of(name: str) -> Path:
    """Where the results of a benchmark are, if it was run."""
    return RESULTS / f"{name}.json"


def load(name: str) -> dict[str, Any] | None:
    file = file_of(name)
    return json.loads(file.read_text()) if file.exists() else None


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        "|" + "---|" * len(headings),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def spread(q: dict[str, float], digits: int = 2) -> str:
    return f"{q['median']:.{digits}f} ({q['q1']:.{digits}f} to {q['q3']:.{digits}f})"


def origin(results: dict[str, Any]) -> list[str]:
    e = results["environment"]
    return [
        f"{e['cpu']}, {e['cores']} cores, torch {e['torch']}, Python {e['python']}, {e['date']}; "
        f"`{e['command']}`",
        "",
    ]


def goal_of(ratio: dict[str, Any]) -> str:
    if ratio["goal"] is None:
        return "none"
    return f"at most {ratio['goal']}" + (": missed" if ratio["median"] > ratio["goal"] else "")
