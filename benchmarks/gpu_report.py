"""What ``benchmarks.gpu`` leaves: ``gpu.json``, the table on the terminal, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.harness import environment, write
from fdg_cuda.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "gpu"
SAME = ("gpu", "torch", "fdg_cuda", "python")  # where results of an earlier run still count
BP, FDG = "#D55E00", "#0072B2"  # which colour-blind readers can tell apart
PANELS = 2  # side by side


class Report:
    """The results by section, on disk after every change.

    What an earlier run on the same machine left there stays until its section is measured again.

    Args:
        folder: of ``gpu.json``.
        settings: of this run, for the file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self._settings = settings
        self.sections: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._take_over()

    @property
    def file(self) -> Path:
        return self._folder / f"{NAME}.json"

    def keep(self, name: str, result: dict[str, Any]) -> None:
        self._clear(name)
        self.sections[name] = result
        self.write()

    def fail(self, name: str, text: str) -> None:
        self._clear(name)
        self.errors[name] = text
        self.write()

    def skip(self, name: str, why: str) -> None:
        self._clear(name)
        self.skipped[name] = why
        self.write()

    def goals(self) -> list[dict[str, Any]]:
        """What was aimed at, and whether it was reached."""
        found: list[dict[str, Any]] = []
        for name, result in self.sections.items():
            found += result.get("goals", [])
            for label, turns in turns_of(name, result):
                for ratio in turns["ratios"]:
                    if ratio["goal"] is not None:
                        found.append(
                            {
                                "name": f"{label}: {ratio['of']} / {ratio['to']}",
                                "measured": ratio["median"],
                                "goal": ratio["goal"],
                                "sense": "at most",
                                "met": ratio["median"] <= ratio["goal"],
                            }
                        )
        return found

    def write(self) -> None:
        write(
            NAME,
            {
                "settings": self._settings,
                "goals": self.goals(),
                "sections": self.sections,
                "errors": self.errors,
                "skipped": self.skipped,
            },
            self._folder,
        )

    def _clear(self, name: str) -> None:
        # A result stays until there is another: an error now does not make it wrong.
        self.errors.pop(name, None)
        self.skipped.pop(name, None)

    def _take_over(self) -> None:
        try:
            earlier = json.loads(self.file.read_text())
            there, here = earlier["environment"], environment()
            if all(there[key] == here[key] for key in SAME):
                self.sections, self.errors = earlier["sections"], earlier["errors"]
                self.skipped = earlier["skipped"]
        except (OSError, ValueError, KeyError, TypeError):
            return


def turns_of(name: str, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The comparisons in a section, each with a title."""
    if "ratios" in result:
        yield name if result["net"] in name else f"{name} ({result['net']} instead)", result
    for turns in result.get("groups", {}).values():
        if "ratios" in turns:
            sizes = "+".join(map(str, turns["sizes"]))
            yield f"{name} {result['net']} {result['precision']}, {sizes} multiprocessors", turns


def all_turns(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every comparison with at least one round, as :func:`turns_of`."""
    return [
        (label, turns)
        for name, result in report["sections"].items()
        for label, turns in turns_of(name, result)
        if turns["rounds"] and turns["cases"]
    ]


def missing(report: dict[str, Any]) -> dict[str, str]:
    """What was not measured, and the last line of why."""
    found = {**report["skipped"], **report["errors"]}
    for name, result in report["sections"].items():
        parts = {name: result}
        parts |= {f"{name} {group}": part for group, part in result.get("groups", {}).items()}
        for part, turns in parts.items():
            found |= {f"{part}, {case}": why for case, why in turns.get("errors", {}).items()}
            if "error" in turns:
                found[part] = turns["error"]
    return {name: text.strip().splitlines()[-1] for name, text in found.items()}


def load(folder: Path) -> dict[str, Any]:
    """What is in ``folder/gpu.json``."""
    report: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text())
    return report


def q_text(q: dict[str, float], digits: int = 2) -> str:
    return f"{q['median']:.{digits}f} ({q['q1']:.{digits}f} to {q['q3']:.{digits}f})"


def show(console: Console, report: dict[str, Any]) -> None:
    """Tables of everything on the terminal."""
    for label, turns in all_turns(report):
        table = Table(title=label, title_justify="left")
        for heading in (
            "case",
            "ms per step",
            "wall, with fill",
            "samples/s",
            "MB",
            "host µs/tick",
        ):
            table.add_column(heading)
        for name, case in turns["cases"].items():
            host = case.get("host_us_per_tick")
            table.add_row(
                name,
                q_text(case["ms_per_step"]),
                f"{case['wall_ms_per_step']['median']:.2f}",
                f"{case['samples_per_s']['median']:.0f}",
                f"{case['memory_mb']:.0f}",
                f"{host['submit']['median']:.0f}" if host else "",
            )
        console.print(table)
    _show_updates(console, report)
    table = Table(title="goals", title_justify="left")
    for heading in ("", "measured", "goal", ""):
        table.add_column(heading)
    for goal in report["goals"]:
        met, wanted = "met" if goal["met"] else "missed", f"{goal['sense']} {goal['goal']:g}"
        table.add_row(goal["name"], f"{goal['measured']:.3g}", wanted, met)
    console.print(table)
    for name, text in missing(report).items():
        console.print(f"not measured: {name}: {text}", markup=False)


def _show_updates(console: Console, report: dict[str, Any]) -> None:
    for size, measured in report["sections"].get("update", {}).get("sizes", {}).items():
        table = Table(title=f"update of {size} parameters", title_justify="left")
        for heading in ("way", "ms", "GB/s", "share of copy"):
            table.add_column(heading)
        for name, case in measured["cases"].items():
            table.add_row(
                name,
                q_text(case["ms"], 3),
                f"{case['gb_per_s']['median']:.0f}",
                f"{case['share_of_copy']['median']:.3f}",
            )
        console.print(table)


def draw_steps(file: Path, report: dict[str, Any]) -> bool:
    """Milliseconds per step of every case, a panel per comparison. False: there is nothing."""
    comparisons = all_turns(report)
    if not comparisons:
        return False
    rows = -(-len(comparisons) // PANELS)
    most = max(len(turns["cases"]) for _, turns in comparisons)
    size = (6.5 * PANELS, rows * (1.0 + 0.36 * most))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, PANELS, squeeze=False).flat)
    for axes, (label, turns) in zip(panels, comparisons, strict=False):
        _bars(axes, label, turns)
    for axes in panels[len(comparisons) :]:
        axes.set_visible(False)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _bars(axes: Axes, label: str, turns: dict[str, Any]) -> None:
    cases = turns["cases"]
    names = list(cases)
    steps = [case["ms_per_step"] for case in cases.values()]
    middles = [q["median"] for q in steps]
    spread = [
        [q["median"] - q["q1"] for q in steps],
        [q["q3"] - q["median"] for q in steps],
    ]
    colors = [FDG if name.startswith("fdg") else BP for name in names]
    bars = axes.barh(range(len(names)), middles, xerr=spread, color=colors, capsize=2)
    axes.bar_label(bars, [f"{middle:.3g}" for middle in middles], padding=4, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(q["q3"] for q in steps))
    axes.set_xlabel("milliseconds per step (median, quartiles)", fontsize=8)
    axes.set_title(label, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
