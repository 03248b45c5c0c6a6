"""Puts the measured figures into README.md: python -m benchmarks.tables [--check]

Every figure comes from a file in ``benchmarks/results``; what has no file says "not measured yet".
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.reports import cuts, gpu, learning, memory, micro, steps

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: begin (python -m benchmarks.tables) -->", "<!-- figures: end -->"
SECTIONS = (
    steps.training_step,
    cuts.auto_cut,
    cuts.cut_time,
    cuts.plans,
    micro.section,
    steps.overhead,
    learning.learning,
    memory.memory,
    gpu.gpu,
)


def generated() -> str:
    lines = [line for section in SECTIONS for line in section()]
    return "\n".join([BEGIN, "", *lines, END])


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = before + generated() + after
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit("README.md does not show benchmarks/results: python -m benchmarks.tables")
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
