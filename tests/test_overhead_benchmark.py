"""``benchmarks.overhead`` as a whole, on a few tiny batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import overhead
from benchmarks.overhead import Overhead, Task
from benchmarks.reports import markdown
from benchmarks.reports import overhead as report

TINY = Task(
    model="mlp", batch_size=2, batches=4, validation_batches=1, every=2, rounds=3, threads=2
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return overhead.measure(TINY, Console(quiet=True))


def test_every_case_and_ratio_is_measured_in_every_round(results: dict[str, Any]) -> None:
    assert list(results["seconds_per_batch"]) == [
        *(overhead.BARE, overhead.REPORTED, overhead.KEPT, overhead.DRAINED),
        *(overhead.EVALUATE, overhead.FLOOR),
    ]
    for q in (*results["seconds_per_batch"].values(), *results["ratios"]):
        assert 0 < q["q1"] <= q["median"] <= q["q3"]
        assert q["n"] == TINY.rounds
    assert [ratio["goal"] for ratio in results["ratios"]] == [None, None, None, None, 1.02]
    assert results["settings"]["split"]


def test_the_goal_is_about_all_of_it_over_nothing_of_it(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    seconds = Overhead(TINY, tmp_path).round(1)
    torch.set_num_threads(threads)
    assert seconds[overhead.TOGETHER] == seconds[overhead.KEPT] + seconds[overhead.EVALUATE]
    assert seconds[overhead.NOTHING] == seconds[overhead.BARE] + seconds[overhead.FLOOR]


def test_what_is_to_be_paid_for_is_done(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    measured = Overhead(TINY, tmp_path)
    torch.set_num_threads(threads)
    for file in tmp_path.rglob("*.*"):
        file.unlink()
    measured.cases[overhead.BARE]()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    measured.cases[overhead.REPORTED]()
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {"metrics.csv"}
    measured.cases[overhead.KEPT]()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    measured.cases[overhead.DRAINED]()
    assert len(list((tmp_path / "drained").iterdir())) == TINY.batches // TINY.every


def test_the_file_is_what_the_readme_shows(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert markdown.NOT_MEASURED in report.section()
    monkeypatch.setattr(overhead, "measure", lambda task, console: results)
    overhead.main(["--out", str(tmp_path), "--rounds", "1"])
    assert json.loads((tmp_path / "overhead.json").read_text())["environment"]["torch"]
    text = "\n".join(report.section())
    assert f"| {overhead.KEPT} / {overhead.BARE} |" in text
    assert "at most 1.02" in text
    assert "(on the way: every 2)" in text
