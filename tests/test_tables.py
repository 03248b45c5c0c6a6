"""docs/results.md, its pictures and README's figures: what is out of date is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from examples import ROOT

from benchmarks import tables
from benchmarks.reports import markdown, memory, training_step
from benchmarks.reports.goals import Goal, at_most, counted
from benchmarks.reports.page import command_of, section_of
from benchmarks.reports.pictures import pictures_of, texts

PAGE = ROOT / "docs" / "results.md"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is generated and of what it is generated from."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    shutil.copy(PAGE, tmp_path / "docs")
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(markdown, "RESULTS", results)
    assert tables.problems() == []
    return tmp_path


def change(copy: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    file = copy / "benchmarks" / "results" / f"{name}.json"
    results = json.loads(file.read_text())
    edit(results)
    file.write_text(json.dumps(results))


def with_a_goal(results: dict[str, Any]) -> dict[str, Any]:
    (ratio,) = (ratio for ratio in results["ratios"] if ratio["goal"])
    return ratio


def test_a_stale_table(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy, "overhead", lambda results: with_a_goal(results).update(median=3.21))
    assert tables.problems() == ["docs/results.md is out of date", "README.md is out of date"]
    with pytest.raises(SystemExit) as exit_:
        tables.main(["--check"])
    assert str(exit_.value.code).splitlines()[0] == "docs/results.md is out of date"
    assert "run python -m benchmarks.tables" in str(exit_.value.code)
    tables.main([])
    assert capsys.readouterr().out.split() == [
        "written:",
        "docs/results.md",
        "written:",
        "README.md",
    ]
    assert "| 3.210 |" in (copy / "README.md").read_text()
    tables.main(["--check"])


def test_a_picture_of_other_results(copy: Path) -> None:
    change(copy, "memory", lambda results: results["rows"]["stash"][0].update(input_bytes=9437185))
    line = "docs/results/memory.png was not drawn from this memory.json"
    assert tables.problems() == [line]  # no table shows single bytes
    assert tables.make() == [copy / "docs" / "results" / "memory.png"]
    assert tables.problems() == []


def test_a_picture_drawn_by_other_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy / "training_step.py"
    other.write_text(Path(str(training_step.__file__)).read_text() + "\n# thicker bars\n")
    monkeypatch.setattr(training_step, "__file__", str(other))
    line = "docs/results/training_step.png was not drawn by this training_step.py and drawing.py"
    assert tables.problems() == [line]
    monkeypatch.undo()
    monkeypatch.setattr(memory, "picture", partial(memory.picture))
    monkeypatch.setattr(memory, "DRAWN_BY", (training_step,), raising=False)
    (picture,) = pictures_of(memory)
    what = picture.stale(ROOT / "docs" / "results")
    assert what == "was not drawn by this memory.py, training_step.py and drawing.py"


def test_missing_files_and_pictures_of_nothing(copy: Path) -> None:
    (copy / "docs" / "results" / "memory.png").unlink()
    (copy / "docs" / "results" / "plan.png").write_bytes(b"no picture")
    (copy / "docs" / "results" / "of_old.png").touch()
    (copy / "docs" / "results.md").unlink()
    assert tables.problems() == [
        "docs/results.md is missing",
        "docs/results/memory.png is missing",
        "docs/results/plan.png was not drawn from this plan.json",
        "docs/results/of_old.png is drawn by no report",
    ]


def test_without_results_sections_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    for module in tables.REPORTS:
        section = section_of(module)
        command = f"{markdown.NOT_MEASURED}: `{command_of(module)}`"
        assert command in section.lines, module.__name__
        assert all(goal.met is None for goal in section.goals)
        assert pictures_of(module) == []
    assert all(markdown.NOT_MEASURED in "".join(m.summary()) for m in tables.IN_README)


def test_links_and_pictures_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {section_of(module).anchor for module in tables.REPORTS} | {"#goals"}
    assert set(re.findall(r"\]\((#[^)]*)\)", text)) == anchors
    shown = set(re.findall(r"!\[[^]]+\]\(results/(\w+)\.png\)", text))
    assert shown == {picture.name for picture in tables.all_pictures()} != set()
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert len(headings) == len(set(headings)) == len(tables.REPORTS) + 2


def test_a_section_without_a_title_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "section", lambda: ["Memory", ""])
    with pytest.raises(ValueError, match=r"memory.section\(\) should begin with \*\*a title"):
        section_of(memory)
    monkeypatch.setattr(memory, "TITLE", "What a stage holds", raising=False)
    section = section_of(memory)
    assert (section.title, section.anchor) == ("What a stage holds", "#what-a-stage-holds")
    assert section.lines == ["", "Memory", ""]


def test_a_stamp_is_read_from_the_file() -> None:
    (picture,) = pictures_of(memory)
    there = texts(ROOT / "docs" / "results" / "memory.png")
    assert there == picture.stamp()
    assert len(set(there.values())) == 2


def test_goals_are_counted() -> None:
    goals = [at_most("a", 0.52, 0.52), at_most("b", 30.1, 30, 1, "s"), Goal("c", "faster")]
    assert [goal.met for goal in goals] == [True, False, None]
    assert (goals[1].wanted, goals[1].measured) == ("at most 30 s", "30.1 s")
    assert counted(goals) == "1 of 3 goals is met, 1 is missed, 1 is not measured yet"
