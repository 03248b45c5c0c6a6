"""The README's Python runs as written, one example behind the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
TRAINING, TIMELINE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


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
