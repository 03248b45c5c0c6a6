"""Every example of the user guide runs as written, one behind the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Cli
from examples import ROOT, run_page

PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page: Path, run_cli: Cli, tmp_path: Path) -> None:
    assert run_page(page, tmp_path, run_cli) > 0


def test_there_is_a_guide() -> None:
    assert PAGES


def test_a_page_whose_example_fails_is_noticed(run_cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```sh\npython -m fdg_cuda train \\\n  --epochs 0 # none\n```\n")
    with pytest.raises(AssertionError, match=r"page.md: python -m fdg_cuda train --epochs 0"):
        run_page(page, tmp_path, run_cli)
    page.write_text("```python\na = 1\n```\n\n```python\nraise KeyError(a)\n```\n")
    with pytest.raises(KeyError) as error:
        run_page(page, tmp_path, run_cli)
    assert error.traceback[-1].lineno == 5
