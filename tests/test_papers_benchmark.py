"""``benchmarks.papers``: every run of the papers' tables, and a tiny one stopped and gone on with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import Cli

from benchmarks import papers
from benchmarks.reports import markdown
from benchmarks.reports import papers as report
from fdg_cuda import models

PROTOCOL = "--epochs 300 --seed 2 --batch-size 128 --momentum 0.9 --weight-decay 0.0005 --beta 0.3"


def test_a_dry_run_names_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    papers.main(["--dry-run", "--devices", "0,1"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Up to 4 stages share 0, 1: ")
    commands = dict(zip(lines[:-1:2], lines[1::2], strict=True))
    everything = papers.published()
    for row in everything["errors"]:
        assert row["model"] in models.names()
        case = f"{papers.data_of(row['table'])}-{row['model']}-{row['method']}"
        if row["method"] != "bp":
            case += f"-k{row['stages']}-beta{row.get('beta', 1.0):g}"
        else:
            case += "-k1"
        for seed in range(3):
            assert f"errors-{case}-300epochs-seed{seed}" in commands
    assert sum(name.startswith("times-") for name in commands) == len(everything["times"]["rows"])
    command = commands["errors-cifar10-resnet56-fdg-k4-beta0.3-300epochs-seed2"]
    assert f"--method fdg --devices 0,0,1,1 {PROTOCOL} --backward-weights stash" in command
    assert "--milestones 150,225,275 --out runs/papers/errors-cifar10" in command
    assert "--warmup-epochs 0" in command
    assert lines[-1].startswith(f"{len(commands)} runs, ")


def test_every_published_figure_has_a_source() -> None:
    everything = papers.published()
    sources = {
        figure.get("source", "FDG") for row in everything["errors"] for figure in row["published"]
    }
    assert sources == set(report.SYMBOLS)
    assert sources | {everything["times"]["source"]} == set(everything["sources"])
    assert everything["protocol"]["source"] in sources


class InProcess:
    """Stands for ``papers.train``; ends with Ctrl-C instead of the run of a number."""

    def __init__(self, run_cli: Cli) -> None:
        self.run_cli = run_cli
        self.trained: list[str] = []
        self.stops_at: int | None = None

    def __call__(self, words: Sequence[str]) -> tuple[int, str]:
        if len(self.trained) == self.stops_at:
            return papers.INTERRUPTED, "interrupted"
        self.trained.append(Path(words[words.index("--out") + 1]).name)
        return self.run_cli(shlex.join(words)), ""


@pytest.mark.usefixtures("one_torch_thread")
def test_a_tiny_run_is_gone_on_with(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    train = InProcess(run_cli)
    monkeypatch.setattr(papers, "train", train)
    command = ["--quick", "--out", str(tmp_path)]
    train.stops_at = 1
    with pytest.raises(SystemExit) as exit_:
        papers.main(command)
    assert exit_.value.code == papers.INTERRUPTED
    assert list(result(tmp_path)["runs"]) == train.trained

    train.stops_at = None
    papers.main(command)
    runs = result(tmp_path)["runs"]
    assert train.trained == list(runs)
    assert [run["method"] for run in runs.values()] == ["bp", "fdg"]
    assert all(0 < run["test_error"] < 1 for run in runs.values())
    papers.main(command)
    assert len(train.trained) == 2

    with pytest.raises(SystemExit, match=r"holds a run with another backward_weights \(stash, not"):
        papers.main([*command, "--backward-weights", "current"])
    check_section(tmp_path, monkeypatch)


def check_section(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stand beside what was published."""
    monkeypatch.setattr(markdown, "RESULTS", folder)
    file = folder / "papers.json"
    results = json.loads(file.read_text())
    run = dict(next(run for run in results["runs"].values() if run["method"] == "fdg"))
    run |= {"data": "cifar10", "model": "resnet56", "stages": 3, "beta": 0.2, "test_error": 0.0611}
    times = {**run, "what": "times", "seconds_per_epoch": 12.34}
    of_bp = {**times, "method": "bp", "stages": 1, "seconds_per_epoch": 20.0}
    results["runs"] |= {"one": run, "other": times, "third": of_bp}
    results["failed"] = {"some run": "the loss became nan"}
    file.write_text(json.dumps(results))
    text = "\n".join(report.section())
    assert "| resnet56 | FDG | 3 | 0.2 | 6.08† | 6.11 (1, 1 epochs only) |" in text
    assert "| resnet56 | FDG | 3 | 27.0 | 52.03 | 12.3 | 61.7 |" in text
    assert "Failed: `some run`: the loss became nan" in text


@pytest.mark.parametrize(
    ("code", "expected"), [(2, "2"), (130, "130"), (0, "130")]
)  # 0 without all epochs: stopped by a signal
def test_what_ends_the_command(
    code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(papers, "train", lambda words: (code, ""))
    with pytest.raises(SystemExit) as exit_:
        papers.main(["--quick", "--out", str(tmp_path)])
    assert str(exit_.value.code) == expected


def test_a_failed_run_is_listed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(papers, "train", lambda words: (1, "error: the loss became nan"))
    papers.main(["--quick", "--out", str(tmp_path)])
    assert list(result(tmp_path)["failed"].values()) == ["error: the loss became nan"] * 2


@pytest.mark.parametrize(
    ("stages", "expected"), [(1, (0,)), (2, (0, 1)), (3, (0, 0, 1)), (4, (0, 0, 1, 1))]
)
def test_stages_share_devices_that_are_few(stages: int, expected: tuple[int, ...]) -> None:
    assert papers.spread_over((0, 1), stages) == expected


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "papers.json").read_text())
    return found
