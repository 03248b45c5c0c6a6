"""Where training from the command line puts its files, and what is not written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import MLP, Cli, check_files, metrics

RUN = f"{MLP} --epochs 1 --batch-size 512"


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def test_a_folder_is_written_over_and_its_settings_repeat_the_run(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_cli(f"{MLP} --epochs 1 --seed 3 --out out") == 0
    written = weights(out)
    assert run_cli(f"{MLP} --epochs 1 --seed 3 --out out") == 0, "it gives the same"
    other = f"{MLP} --epochs 2 --milestones '' --out out"
    assert weights(out) == written
    capfd.readouterr()
    assert run_cli(other) == 2
    errors = capfd.readouterr().err
    assert "out holds a run of 1 epoch with other settings (" in errors
    assert "--epochs was 1 and is 2 now; " in errors
    assert "--seed was 3 and is 0 now" in errors
    assert errors.strip().endswith("name another folder with --out, or replace it with --overwrite")
    assert weights(out) == written
    assert run_cli(f"{other} --overwrite") == 0
    before = weights(out)
    assert len(metrics(out)) == 2
    check_files(out, "mlp")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["settings"]["split"] is not None
    assert settings["settings"]["threads"] >= 1
    words = settings["command"].removeprefix("fdg-cuda ")
    assert "--split" in words
    (out / "weights.safetensors").unlink()
    assert run_cli(words) == 0
    assert weights(out) == before


@pytest.mark.parametrize("resume", ["", "--resume"])
def test_a_run_without_checkpoints_is_not_written_over_either(
    run_cli: Cli, tmp_path: Path, resume: str
) -> None:
    assert run_cli(f"{RUN} --no-checkpoints --out out") == 0
    before = weights(tmp_path / "out")
    assert run_cli(f"{RUN} --seed 5 --out out {resume}") == 2
    assert weights(tmp_path / "out") == before


def test_another_cut_is_another_run(run_cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli(f"{RUN} --split 2 --out out") == 0
    assert run_cli(f"{RUN} --split 2 --out out") == 0
    capfd.readouterr()
    assert run_cli(f"{RUN} --split 1 --out out") == 2
    assert "--split was 2 and is 1 now" in capfd.readouterr().err


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"settings": 3, "epochs_finished": 1}'])
def test_what_is_no_record_of_a_run_is_not_written_over(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str], record: str
) -> None:
    file = tmp_path / "out" / "settings.json"
    file.parent.mkdir()
    file.write_text(record)
    assert run_cli(f"{RUN} --out out") == 2
    assert "out/settings.json, which is no record of a run" in capfd.readouterr().err
    assert file.read_text() == record


def test_the_default_folder_tells_what_was_trained_and_another_run_gets_the_next(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = f"{RUN} --method bp"
    folders = [tmp_path / "runs" / f"digits-mlp-bp-k2{end}" for end in ("", "-2", "-3")]
    for seed in ("", "--seed 1", "--seed 2"):
        assert run_cli(f"{run} {seed}") == 0
    for folder in folders:
        check_files(folder, "mlp")
    before = [weights(folder) for folder in folders]
    assert len(set(before)) == 3
    assert run_cli(f"{run} --seed 1") == 0, "where it was"
    capfd.readouterr()
    assert run_cli(f"{run} --seed 2 --resume") == 0
    said = capfd.readouterr()
    assert "nothing was left to train" in said.err
    assert "digits-mlp-bp-k2-3" in said.err
    assert run_cli(f"{run} --seed 9 --resume") == 2, "no run has these settings"
    assert "--seed was 0 and is 9 now" in capfd.readouterr().err
    assert [weights(folder) for folder in folders] == before
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert json.loads((folders[1] / "settings.json").read_text())["settings"]["seed"] == 1


def test_a_finished_run_cannot_be_prolonged(
    run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(f"{RUN} --out out") == 0
    capfd.readouterr()
    assert run_cli(f"{RUN} --epochs 3 --resume --out out") == 2
    errors = capfd.readouterr().err
    assert "--epochs was 1 and is 3 now" in errors
    assert "(a schedule follows from the number of epochs)" in errors
