"""The pictures of docs/results: drawn by report modules, and stamped with what they were drawn from.

Whether a picture is up to date is told by its stamp: pixels differ with matplotlib's version, and to
draw just to compare would take long.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks.reports import drawing
from benchmarks.reports.markdown import file_of, load
from fdg_cuda.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RESULTS_KEY, MODULE_KEY = "Results-SHA256", "Drawn-By-SHA256"


@dataclass(frozen=True)
class Picture:
    """One picture of a report module whose benchmark was run.

    Attributes:
        name: of the file, without ``.png``.
        module: draws it from the result file of its own name.
        draw: makes the figure of that file's content.
    """

    name: str
    module: ModuleType
    draw: Callable[[dict[str, Any]], Figure]

    @property
    def results(self) -> str:
        """The name of the result file."""
        return self.module.__name__.rpartition(".")[2]

    @property
    def drawn_by(self) -> list[ModuleType]:
        """What decides how it looks: the function's module, ``DRAWN_BY`` of the report module, and what
        all pictures share."""
        draw = self.draw
        while isinstance(draw, partial):
            draw = draw.func
        return [sys.modules[draw.__module__], *getattr(self.module, "DRAWN_BY", ()), drawing]

    def stamp(self) -> dict[str, str]:
        """What the file says it was drawn from and by."""
        sources = [_source_of(module).read_bytes() for module in self.drawn_by]
        return {
            RESULTS_KEY: _hash(file_of(self.results).read_bytes()),
            MODULE_KEY: _hash(b"".join(sources)),
        }

    def save(self, folder: Path) -> Path:
        """Draw it into ``folder``."""
        results = load(self.results)
        assert results is not None, "pictures_of names those with results only"
        file = folder / f"{self.name}.png"
        figure = self.draw(results)
        with replacing(file) as temporary:
            # Without "Software" the same matplotlib of another release draws the same file.
            figure.savefig(temporary, format="png", metadata={"Software": None, **self.stamp()})
        return file

    def stale(self, folder: Path) -> str | None:
        """What is wrong with the file in ``folder``; None: it is up to date."""
        file = folder / f"{self.name}.png"
        if not file.exists():
            return "is missing"
        there, due = texts(file), self.stamp()
        if there.get(RESULTS_KEY) != due[RESULTS_KEY]:
            return f"was not drawn from this {self.results}.json"
        if there.get(MODULE_KEY) != due[MODULE_KEY]:
            names = [_source_of(module).name for module in self.drawn_by]
            return f"was not drawn by this {', '.join(names[:-1])} and {names[-1]}"
        return None


def pictures_of(module: ModuleType) -> list[Picture]:
    """Those that a report module draws, if its benchmark was run: ``PICTURES``, name by function, or
    ``picture``, which has the module's name."""
    name = module.__name__.rpartition(".")[2]
    if load(name) is None:
        return []
    draws = dict(getattr(module, "PICTURES", {}))
    if hasattr(module, "picture"):
        draws.setdefault(name, module.picture)
    return [Picture(each, module, draw) for each, draw in draws.items()]


def texts(file: Path) -> dict[str, str]:
    """The texts in a PNG file, by keyword; none if it is no PNG.

    Source: PNG specification, third edition, sections 5.2 to 5.4 and 11.3.3.2 (``tEXt``).
    """
    data = file.read_bytes()
    found: dict[str, str] = {}
    if not data.startswith(SIGNATURE):
        return found
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"tEXt":
            keyword, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
            found[keyword.decode("latin-1")] = text.decode("latin-1")
        at += length + 12  # its length, its kind and its checksum are four bytes each
    return found


def _source_of(module: ModuleType) -> Path:
    return Path(str(module.__file__))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
