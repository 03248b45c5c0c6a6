"""The options of every benchmark that has results of its own: ``--quick`` and ``--out``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

QUICK = "only see that it works; needs --out"


def make_parser(doc: str | None, quick: str = QUICK) -> argparse.ArgumentParser:
    """A parser that has them.

    Args:
        doc: the benchmark's docstring, whose first line describes it.
        quick: what ``--quick`` does.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help="folder of the result file")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was given, with ``out`` the results' own folder if no other is named. A quick run may not
    replace results: it needs another."""
    given = parser.parse_args(arguments)
    if given.quick and (given.out is None or given.out.resolve() == RESULTS):
        parser.error("--quick measures nothing worth keeping: name another folder with --out")
    given.out = given.out or RESULTS
    return given


def settings_of(given: argparse.Namespace, quick: Mapping[str, Any]) -> argparse.Namespace:
    """All other options, which say what is measured; in a quick run those of ``quick`` instead, whatever
    was given."""
    settings = {name: value for name, value in vars(given).items() if name not in ("quick", "out")}
    return argparse.Namespace(**settings | (dict(quick) if given.quick else {}))
