"""docs/results.md: every section behind the list of goals, and what README shows of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from benchmarks.reports.goals import Goal, counted
from benchmarks.reports.markdown import NOT_MEASURED, table

HEADING = re.compile(r"\*\*(?P<bold>.+?)\*\*(?P<rest>.*)$|#+ (?P<title>.+)$")

INTRODUCTION = """\
# Results

<!-- Made by python -m benchmarks.tables from benchmarks/results: change that, not this. -->

What this is worth, and what not. Every figure here comes from a file in
[benchmarks/results](../benchmarks/results) that a command wrote, but for those that papers printed:
these are in [benchmarks/published.json](../benchmarks/published.json) with their sources. Every goal
that was set stands here whether it was met or not.

How times are measured, unless a section says otherwise: a median, with the lower and upper quartile
in brackets, of rounds in which all sides take turns, so that a slow moment of the machine meets all of
them; ratios are taken within a round, and so may differ a little from the ratio of two medians. Under
each table stand the machine, the versions and the command that repeats it, on a quiet machine from the
root of a clone. The machine is a shared one, and its speed changes by up to a factor of two from hour to
hour: compare times within a table, and never across tables. A ratio whose quartiles lie on both sides of
1 says that two ways take about the same time.

```sh
pip install -c constraints.txt -e '.[dev]'
python -m benchmarks.training_step    # or another command from this page; it writes benchmarks/results
python -m benchmarks.tables           # this page, its pictures and README's tables
```
"""


class Section(NamedTuple):
    """A report module's part of the page.

    Attributes:
        title: without markup.
        lines: what stands under it.
        goals: what it aimed at.
    """

    title: str
    lines: list[str]
    goals: list[Goal]

    @property
    def anchor(self) -> str:
        """Where a link on the page leads to it, as GitHub names headings."""
        kept = re.sub(r"[^\w\- ]", "", self.title.lower())
        return f"#{kept.replace(' ', '-')}"


def section_of(module: ModuleType) -> Section:
    """What a report module says: ``section()`` and, where it has them, ``goals()``. Its title is
    ``TITLE``, or the section's first line, a heading or bold text and perhaps a note.

    Raises:
        ValueError: the section has no title.
    """
    lines = module.section()
    if hasattr(module, "TITLE"):
        title, body = module.TITLE, ["", *lines]
    else:
        title, body = _titled(lines, module.__name__)
    command = f"`{command_of(module)}`"
    body = [f"{line}: {command}" if line == NOT_MEASURED else line for line in body]
    goals = module.goals() if hasattr(module, "goals") else []
    return Section(title, body, goals)


def _titled(lines: Sequence[str], module: str) -> tuple[str, list[str]]:
    """Title and body of a section that begins with its title."""
    first, *body = lines
    found = HEADING.match(first)
    if found is None:
        raise ValueError(
            f"{module}.section() should begin with **a title** or ## a title, or the module have a "
            f"TITLE; it begins with {first!r}"
        )
    note = (found["rest"] or "").strip(" :")
    if note.startswith("(") and note.endswith(")"):
        # A sentence of its own under a heading, instead of brackets behind bold words.
        note = f"{note[1].upper()}{note[2:-1]}."
    return found["bold"] or found["title"], ["", note, *body] if note else body


def command_of(module: ModuleType) -> str:
    """What measures the results of a report module: ``COMMAND``, or the benchmark of its name."""
    default = f"python -m benchmarks.{module.__name__.rpartition('.')[2]}"
    return str(getattr(module, "COMMAND", default))


def page(modules: Sequence[ModuleType]) -> str:
    """docs/results.md."""
    sections = [section_of(module) for module in modules]
    lines = [*INTRODUCTION.splitlines(), ""]
    lines += ["## Contents", "", "- [Goals](#goals)"]
    lines += [f"- [{section.title}]({section.anchor})" for section in sections]
    lines += ["", "## Goals", "", f"{counted(_all_goals(sections))}. {_by_section(sections)}", ""]
    rows = [
        [f"[{goal.name}]({section.anchor})", goal.wanted, goal.measured, goal.verdict]
        for section in sections
        for goal in section.goals
    ]
    lines += table(["goal", "wanted", "measured", ""], rows)
    for section in sections:
        lines += [f"## {section.title}", *section.lines]
    return "\n".join(lines).rstrip("\n") + "\n"


def short(modules: Sequence[ModuleType], all_modules: Sequence[ModuleType]) -> list[str]:
    """What README shows: the summaries of ``modules``, and what was missed in ``all_modules``."""
    lines = [line for module in modules for line in module.summary()]
    sections = [section_of(module) for module in all_modules]
    goals = _all_goals(sections)
    rows = [
        [goal.name, goal.wanted, goal.measured]
        for goal in goals
        if goal.met is False  # None was not measured
    ]
    lines += [f"**What was missed**: {counted(goals)}.", ""]
    lines += table(["missed", "wanted", "measured"], rows) if rows else []
    return lines


def _by_section(sections: Sequence[Section]) -> str:
    """Some benchmarks have many goals, most have one."""
    parts = [
        f"{section.title}: {sum(goal.met is True for goal in section.goals)} of {len(section.goals)}"
        for section in sections
        if section.goals
    ]
    return f"Met, by section: {'; '.join(parts)}."


def _all_goals(sections: Sequence[Section]) -> list[Goal]:
    return [goal for section in sections for goal in section.goals]
