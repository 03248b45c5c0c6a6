"""The README's Python runs as written, one example behind the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from examples import ROOT, examples

TRAINING, TIMELINE = (
    example.text for example in examples(ROOT / "README.md") if example.language == "python"
)


def test_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(TRAINING, "README.md", "exec"), names)
    loss, accuracy = map(float, capsys.readouterr().out.split())
    assert loss < 0.5
    assert accuracy > 0.8

    exec(compile(TIMELINE, "README.md", "exec"), names)
    assert re.match(r"fdg, 2 stages: \d+ ticks in .* bubble", capsys.readouterr().out)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["trace.json", "trace.png"]
