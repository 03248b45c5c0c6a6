"""Puts what capturing makes of the tests' models into docs/capture.md: python -m docs.model_table

``--check`` writes nothing and fails if the table is not what is there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fdg_cuda.capture import capture

if TYPE_CHECKING:
    from fdg_cuda.graph_chain import Crossing

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "capture.md"
BEGIN, END = "<!-- models: begin (python -m docs.model_table) -->", "<!-- models: end -->"
HEAD = """
| model | works | pieces | cuts that one tensor crosses | crosses the middle cut | called as a whole |
|---|---|---|---|---|---|
"""


def table() -> str:
    """A row per model of tests/captured_models.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)  # more only cost time, of such small models
    from captured_models import FAMILIES, OTHERS, gpt, made

    rows = []
    for name in [*FAMILIES, *OTHERS, "gpt, tied head"]:
        model, sample = gpt(tied=True) if name == "gpt, tied head" else made(name)
        chain = capture(model, sample)
        single = sum(len(chain.crossing(cut)) == 1 for cut in chain.allowed_cuts())
        works = (
            "yes" if len(chain) > 1 else f"not cut: {_without_places(chain.what_forbids_cuts())}"
        )
        crossing = (
            ", ".join(map(_shown, chain.crossing(len(chain) // 2))) if len(chain) > 1 else "-"
        )
        kinds = Counter(type(model.get_submodule(path)).__name__ for path in chain.whole)
        whole = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "-"
        rows.append(f"| {name} | {works} | {len(chain)} | {single} | {crossing} | {whole} |")
    return HEAD + "\n".join(rows) + "\n\n"


def _without_places(reason: str) -> str:
    """Files are elsewhere on every machine."""
    return re.sub(r' \(File "[^"]*", line \d+, in \w+\)', "", reason)


def _shown(crossing: Crossing) -> str:
    shape = "x".join(map(str, crossing.info.shape))
    return f"sizes of {shape}" if crossing.sizes_only else shape


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the table is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        print(f"{PAGE} has no lines {BEGIN} and {END} to put the table between", file=sys.stderr)
        return 1
    new = f"{before}{BEGIN}\n{table()}{END}{after}"
    if check and new != page:
        print(
            f"the table in {PAGE} is out of date: run python -m docs.model_table", file=sys.stderr
        )
        return 1
    if not check:
        PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
