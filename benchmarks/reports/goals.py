"""What was aimed at, and whether it was reached: the same form in every section."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.reports.markdown import NOT_MEASURED


@dataclass(frozen=True)
class Goal:
    """One aim of a benchmark.

    Attributes:
        name: what is measured.
        wanted: in words, such as ``at most 0.52``.
        measured: the figure as it is shown, or ``NOT_MEASURED``.
        met: None where nothing was measured.
    """

    name: str
    wanted: str
    measured: str = NOT_MEASURED
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """For a table's cell; what was missed stands out."""
        return {None: NOT_MEASURED, True: "met", False: "**missed**"}[self.met]


def at_most(name: str, measured: float, limit: float, digits: int = 3, unit: str = "") -> Goal:
    """``measured`` is to be at most ``limit``, both in ``unit``."""
    behind = f" {unit}" if unit else ""
    return Goal(
        name, f"at most {limit:g}{behind}", f"{measured:.{digits}f}{behind}", measured <= limit
    )


def of_ratios(case: str, ratios: Iterable[dict[str, Any]]) -> list[Goal]:
    """The goals among ratios as benchmarks write them: ``of``, ``to``, ``goal`` and quartiles."""
    return [
        at_most(f"{case}: {ratio['of']} / {ratio['to']}", ratio["median"], ratio["goal"])
        for ratio in ratios
        if ratio["goal"] is not None
    ]


def counted(goals: Iterable[Goal]) -> str:
    """Such as ``7 of 12 goals are met, 4 are missed, 1 is not measured yet``."""
    found = list(goals)
    met, missed, absent = (
        sum(goal.met is verdict for goal in found) for verdict in (True, False, None)
    )
    parts = [f"{met} of {len(found)} goals {_are(met)} met", f"{missed} {_are(missed)} missed"]
    return ", ".join([*parts, *([f"{absent} {_are(absent)} {NOT_MEASURED}"] if absent else [])])


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
