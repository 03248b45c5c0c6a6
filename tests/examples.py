"""Running a page's examples as a reader would: in their order, in one folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
COMMAND = "python -m fdg_cuda "
FILES = ("toml", "yaml")  # their first line names the file, as a comment


class Example(NamedTuple):
    """A code block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def examples(page: Path) -> list[Example]:
    text = page.read_text()
    return [
        Example(found[1], found[2], text[: found.start(2)].count("\n") + 1)
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]


def commands(block: str) -> Iterator[str]:
    """The arguments of each `python -m fdg_cuda` of a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith(COMMAND):
            yield shlex.join(shlex.split(line.removeprefix(COMMAND), comments=True))


def run_page(page: Path, folder: Path, run_cli: Callable[[str], int]) -> int:
    """Run ``page``'s Python, shell commands and files in ``folder``, the current one.

    Returns:
        How many examples were run.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    ran = 0
    for language, text, line in examples(page):
        if language == "python":
            # Line numbers of a traceback are those of the page.
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
            ran += 1
        elif language == "sh":
            for arguments in commands(text):
                assert run_cli(arguments) == 0, f"{page.name}: {COMMAND}{arguments}"
                ran += 1
        elif language in FILES:
            name = text.splitlines()[0].removeprefix("# ")
            assert name.endswith(f".{language}"), f"{page.name}:{line}: which file is this?"
            (folder / name).write_text(text)
    return ran
