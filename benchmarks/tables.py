"""Makes docs/results.md, its pictures and README's figures of benchmarks/results.

    python -m benchmarks.tables [--check]

``--check`` changes nothing, and fails with a line for each file that is out of date. It draws nothing:
a picture says in its metadata what it was drawn from and by.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reports import (
    auto_cut,
    compare,
    cut_time,
    gpu,
    gpu_learning,
    learning,
    memory,
    micro,
    overhead,
    papers,
    plan,
    simulation,
    staleness,
    training_step,
)
from benchmarks.reports.page import page, short
from benchmarks.reports.pictures import Picture, pictures_of

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: begin (python -m benchmarks.tables) -->", "<!-- figures: end -->"
REMEDY = "run python -m benchmarks.tables and commit what it writes"

# In the order of the page. A new benchmark is one line here.
REPORTS = (
    compare,
    training_step,
    learning,
    staleness,
    memory,
    auto_cut,
    cut_time,
    plan,
    simulation,
    micro,
    overhead,
    gpu,
    gpu_learning,
    papers,
)
IN_README = (compare, learning, gpu)  # their summary()


def folder_of_pictures() -> Path:
    return ROOT / "docs" / "results"


def all_pictures() -> list[Picture]:
    return [picture for module in REPORTS for picture in pictures_of(module)]


def documents() -> dict[Path, str]:
    """What is generated as text, by file."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme.name} should have a line {BEGIN} and behind it a line {END}")
    figures = "\n".join([BEGIN, "", *short(IN_README, REPORTS), END])
    return {ROOT / "docs" / "results.md": page(REPORTS), readme: before + figures + after}


def strays() -> list[Path]:
    """Pictures that no report draws any more."""
    due = {f"{picture.name}.png" for picture in all_pictures()}
    return [file for file in sorted(folder_of_pictures().glob("*")) if file.name not in due]


def problems() -> list[str]:
    """A line for every file that is not what it should be."""
    found = [
        f"{file.relative_to(ROOT)} " + ("is out of date" if file.exists() else "is missing")
        for file, text in documents().items()
        if not file.exists() or file.read_text() != text
    ]
    folder = folder_of_pictures()
    for picture in all_pictures():
        what = picture.stale(folder)
        if what is not None:
            found.append(f"{(folder / picture.name).relative_to(ROOT)}.png {what}")
    return found + [f"{file.relative_to(ROOT)} is drawn by no report" for file in strays()]


def make() -> list[Path]:
    """Write what is out of date; returns those files."""
    written = []
    for file, text in documents().items():
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            written.append(file)
    folder = folder_of_pictures()
    folder.mkdir(parents=True, exist_ok=True)
    for stray in strays():
        stray.unlink()
    return written + [
        picture.save(folder) for picture in all_pictures() if picture.stale(folder) is not None
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if anything is out of date")
    if parser.parse_args(arguments).check:
        found = problems()
        if found:
            sys.exit("\n".join([*found, REMEDY]))
        return
    for file in make():
        print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
