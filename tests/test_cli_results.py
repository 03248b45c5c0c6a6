"""Training from the command line: what it writes, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import same_bits
from commands import MLP, PINNED, Cli, check_files, metrics, start
from safetensors import safe_open
from safetensors.torch import load_file

from fdg_cuda import FDGRunner, data, models, train
from fdg_cuda.batches import Loader
from fdg_cuda.metrics import Evaluation

# -- the files of a run ---------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bytes_in_two_processes(tmp_path: Path) -> None:
    for out in ("first", "second"):
        process = start(f"{PINNED} --out {out}", tmp_path)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "test accuracy" in output
        assert output.count("samples/s") == 5, "one line per epoch, and the summary"
    first, second = ((tmp_path / out / "weights.safetensors") for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    check_files(tmp_path / "first", "resnet20")
    rows = metrics(tmp_path / "first")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["test_accuracy"]) > 0.9
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    with safe_open(first, "pt") as weights:
        stored = weights.metadata()
    assert stored["model"] == "resnet20"
    assert stored["data"] == "digits"
    assert stored["seed"] == "7"
    assert "version" in stored


def test_the_weights_file_scores_what_the_metrics_say(run_cli: Cli, tmp_path: Path) -> None:
    assert run_cli(f"{MLP} --epochs 1 --out out") == 0
    spec = data.load("digits")
    model = models.build("mlp", in_channels=1, num_classes=10, image_size=8).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    ((x, y),) = data.BatchLoader(spec.test, len(spec.test))
    accuracy = float((model(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(float(metrics(tmp_path / "out")[0]["test_accuracy"]))


@pytest.mark.parametrize(
    "options",
    [
        "--method bp",
        "--method ddg --devices cpu,cpu,cpu --split 1,2",
        "--devices cpu --nesterov --threads 1",
        "--backward-weights current --channels-last --warmup-epochs 0",
    ],
)
def test_options_reach_the_run(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: str
) -> None:
    assert run_cli(f"{MLP} --epochs 1 --batch-size 256 --out out {options}") == 0
    check_files(tmp_path / "out", "mlp")
    written = json.loads((tmp_path / "out" / "settings.json").read_text())["command"]
    words = shlex.split(options)
    assert all(word in shlex.split(written) for word in words)
    assert "method" in capfd.readouterr().out


# -- how a run can end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "word"), [("", 0, "SIGINT: stopped"), ("--no-checkpoints", 130, "interrupted")]
)
def test_ctrl_c_writes_what_there_is(tmp_path: Path, more: str, code: int, word: str) -> None:
    process = start(f"{MLP} --epochs 100000 --out out {more}", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert word in errors
    assert "written" in output
    check_files(tmp_path / "out", "mlp")
    rows = metrics(tmp_path / "out")
    assert len(rows) >= 1
    record = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert record["epochs_finished"] == len(rows)
    assert f"{len(rows)} of 100000 epochs were finished" in errors


def test_interrupted_files_belong_to_one_epoch(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the last row of metrics.csv, not of the epoch that was broken off."""
    options = f"{MLP} --epochs 4 --milestones 9 --warmup-epochs 0 --out"
    assert run_cli(f"{options} whole --epochs 2") == 0
    evaluate = FDGRunner.evaluate
    calls = 0

    def interrupted(runner: FDGRunner, loader: Loader) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return evaluate(runner, loader)

    monkeypatch.setattr(FDGRunner, "evaluate", interrupted)
    assert run_cli(f"{options} broken") == 130
    assert len(metrics(tmp_path / "broken")) == 2
    whole, broken = (
        load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "broken")
    )
    assert same_bits(whole, broken)


@pytest.mark.parametrize("when", ["loading", "first epoch"])
def test_ctrl_c_before_an_epoch_is_finished(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if when == "loading":
        monkeypatch.setattr(data, "load", interrupt)
    else:
        monkeypatch.setattr("fdg_cuda.progress.PlainProgress.batch", interrupt)
    assert run_cli(f"{MLP} --out out") == 130
    assert "interrupted" in capfd.readouterr().err
    if when == "loading":
        assert not (tmp_path / "out").exists()
    else:
        check_files(tmp_path / "out", "mlp")
        assert metrics(tmp_path / "out") == []


def test_divergence_keeps_the_last_finite_weights(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(f"{MLP} --lr 1e9 --warmup-epochs 0 --seed 5 --out out") == 1
    errors = capfd.readouterr().err
    assert "the loss became" in errors
    assert "smaller lr" in errors
    assert len(errors.splitlines()) == 1
    check_files(tmp_path / "out", "mlp")
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    torch.manual_seed(5)
    begin = models.build("mlp", in_channels=1, num_classes=10, image_size=8).state_dict()
    assert all(torch.equal(weights[key], begin[key]) for key in begin)


@pytest.mark.parametrize(
    ("named", "full_from", "resumable"),
    [("metrics.csv", 0, False), ("metrics.csv", 1, True), ("curves.png", 0, True)],
)
def test_results_that_cannot_be_written(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    named: str,
    full_from: int,
    resumable: bool,
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == named and full_from <= sum(known == named for known in asked):
            raise OSError(errno.ENOSPC, "No space left on device")
        asked.append(target.name)
        replace(source, target)

    asked: list[str] = []
    monkeypatch.setattr("fdg_cuda.files.os.replace", full)
    run = f"{MLP} --epochs 2 --batch-size 512 --out out"
    assert run_cli(run) == 1
    errors = capfd.readouterr().err
    assert f"out/{named} cannot be written: No space left on device." in errors
    assert ("Once there is room, the same command with --resume goes on." in errors) == resumable
    assert len(errors.splitlines()) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert not resumable or run_cli(f"{run} --resume") == 0
    assert not resumable or len(metrics(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "changed",
    ["--model resnet20", "--devices cpu,cpu,cpu", "--method bp", "--model resnet20 --split 6"],
)
def test_going_on_with_other_settings_names_them(
    run_cli: Cli, capfd: pytest.CaptureFixture[str], changed: str
) -> None:
    run = f"{MLP} --epochs 1 --batch-size 512 --out out"
    assert run_cli(run) == 0
    capfd.readouterr()
    assert run_cli(f"{run} --resume {changed}") == 2
    errors = capfd.readouterr().err
    option, value = changed.split()[:2]
    was = {"--model": "mlp", "--devices": "cpu,cpu", "--method": "fdg"}[option]
    assert f"had other settings: {option} was {was} and is {value} now" in errors
    assert len(errors.splitlines()) == 1
    assert "state_dict" not in errors


def test_a_setting_newer_than_the_checkpoint_had_its_default(
    run_cli: Cli, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, known = f"{MLP} --epochs 1 --batch-size 512 --out out", train.with_effect
    with monkeypatch.context() as patch:
        patch.setattr(
            train,
            "with_effect",
            lambda settings: {k: v for k, v in known(settings).items() if k != "capture"},
        )
        assert run_cli(run) == 0
    assert run_cli(f"{run} --resume") == 0
    capfd.readouterr()
    assert run_cli(f"{run} --resume --capture") == 2
    assert "other settings: --capture was" in capfd.readouterr().err


def test_an_unfinished_run_is_told_in_the_command_lines_words(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = f"{MLP} --epochs 2 --batch-size 512 --checkpoint-every 1 --out out"
    with monkeypatch.context() as patch:
        patch.setattr("fdg_cuda.train.write_metrics", full)
        assert run_cli(run) == 1
    errors = capfd.readouterr().err
    assert "what belongs into out cannot be written: No space left on device. Once" in errors
    assert run_cli(run) == 2
    errors = capfd.readouterr().err
    assert "out/checkpoints holds the checkpoints of an unfinished run" in errors
    assert "(--resume), delete them (--overwrite), or choose another folder (--out)" in errors


def test_half_precision(run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli(f"{MLP} --epochs 1 --precision float16 --out out") == 0
    (row,) = metrics(tmp_path / "out")
    assert float(row["loss_scale"]) <= 2**16
    assert all(row[f"skipped_{k}"].isdigit() for k in range(2))
    skipped = f"{row['skipped_0']} and {row['skipped_1']} of {row['updates']} per stage"
    assert f"float16, updates left out: {skipped}, loss scale" in capfd.readouterr().out
    assert int(row["updates"]) >= int(row["skipped_0"])


def test_a_checkpoint_that_finds_no_room_ends_nothing(
    run_cli: Cli,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fdg_cuda.checkpoint import CheckpointFolder

    save, full = CheckpointFolder.save, [True]

    def once_full(*arguments: Any, **keywords: Any) -> Path:
        if full and full.pop():
            raise OSError(28, "No space left on device")
        return save(*arguments, **keywords)

    monkeypatch.setattr(CheckpointFolder, "save", once_full)
    assert run_cli(f"{MLP} --epochs 2 --batch-size 512 --out out") == 0
    assert "No space left on device" in caplog.text
    assert "the next one is another try" in caplog.text
    kept = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    assert kept == ["checkpoint-000000006.safetensors"], "that of the second epoch"
    assert len(metrics(tmp_path / "out")) == 2
