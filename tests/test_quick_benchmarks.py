"""``--quick`` of the benchmarks: whole runs of those that have no test file of their own, and what none
of them does."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import cuts, training_step
from benchmarks.reports import markdown

pytestmark = pytest.mark.usefixtures("no_thread_left")

# What the report says of a quick run.
SAID = {
    "auto_cut": "mlp",
    "cut_time": "mlp",
    "memory": "mlp, batch 2, K = 2",
    "simulation": "K = 4, 20 ticks",
    "training_step": "mlp, batch 2",
}
TESTED_ELSEWHERE = ["compare", "learning", "overhead", "papers", "plan", "staleness"]


@pytest.mark.parametrize("name", SAID)
def test_a_quick_run_and_what_is_said_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = import_module(f"benchmarks.reports.{name}")
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert markdown.NOT_MEASURED in report.section()
    import_module(f"benchmarks.{name}").main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["environment"]["torch"]
    text = "\n".join(report.section())
    assert markdown.NOT_MEASURED not in text
    assert SAID[name] in text


def test_whole_steps_with_a_cut_inside_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "WORTH_CAPTURING", 0.0)
    training_step.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "training_step.json").read_text())
    assert results["settings"]["points"]
    assert results["seconds_per_step"][training_step.INSIDE]["median"] > 0
    beside = [ratio["to"] for ratio in results["ratios"] if ratio["of"] == training_step.INSIDE]
    assert beside == ["bp, 1 core", "bp, 2 cores"]


@pytest.mark.parametrize("name", [*SAID, *TESTED_ELSEWHERE])
def test_a_quick_run_does_not_replace_the_result(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        import_module(f"benchmarks.{name}").main(["--quick"])
    assert "name another folder with --out" in capsys.readouterr().err
