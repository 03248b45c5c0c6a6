"""TensorBoard, traces and the log of stages from the command line: the files, and the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chains import same_bits
from commands import FILES, MLP, Cli
from matplotlib.image import imread
from safetensors.torch import load_file

from fdg_cuda.progress import PlainProgress

RUN = f"{MLP} --split 2 --batch-size 256 --epochs 2 --threads 2"  # 6 batches per epoch
VIEWS = "--tensorboard --trace 3:9 --log-stages 4"


def curves(folder: Path) -> dict[str, list[int]]:
    """The steps of every curve that is shown."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def first_columns(path: Path) -> list[str]:
    return [",".join(line.split(",")[:4]) for line in path.read_text().splitlines()]


STAGES = [
    "step,epoch,batch,stage",
    *("4,1,4,0", "4,1,4,1", "8,2,2,0", "8,2,2,1", "12,2,6,0", "12,2,6,1"),
]


def test_views_are_files_and_change_nothing(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    assert run_cli(f"{RUN} --out plain") == 0
    assert run_cli(f"{RUN} --out out {VIEWS}") == 0
    out = tmp_path / "out"
    assert same_bits(
        *(load_file(each / "weights.safetensors") for each in (tmp_path / "plain", out))
    )
    views = {"tensorboard", "trace.json", "trace.png", "stages.csv"}
    assert {path.name for path in out.iterdir()} - {"checkpoints"} == FILES | views
    output = capfd.readouterr().out
    assert "6 ticks from 3 on: out/trace.json opens in https://ui.perfetto.dev" in output
    (written,) = (
        line
        for line in output.splitlines()
        if line.startswith("written") and "out" in line and "trace.json" in line
    )
    assert all(name in written for name in views)
    ticks = {
        event["args"]["tick"]
        for event in json.loads((out / "trace.json").read_text())["traceEvents"]
        if "tick" in event.get("args", {})
    }
    assert ticks == {*range(3, 8), 0}, "an epoch has 8 ticks, and the ninth is the next one's first"
    assert imread(out / "trace.png").ndim == 3
    assert first_columns(out / "stages.csv") == STAGES
    shown = curves(out / "tensorboard")
    assert shown["test/accuracy"] == shown["test/loss"] == shown["train/loss"] == [6, 12]
    for stage in (0, 1):
        assert shown[f"staleness/stage_{stage}"] == [4, 8, 12]
        assert shown[f"update_ratio/stage_{stage}"] == [4, 8, 12]


def test_a_run_goes_on_with_its_views_or_with_more(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    batch, seen = PlainProgress.batch, 0

    def interrupting(self: PlainProgress, result: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 9:
            raise KeyboardInterrupt
        batch(self, result)

    for folder, first, then in (("same", VIEWS, VIEWS), ("later", "", VIEWS)):
        seen = 0
        with monkeypatch.context() as patch:
            patch.setattr(PlainProgress, "batch", interrupting)
            assert run_cli(f"{RUN} --out {folder} {first}") == 130
        assert run_cli(f"{RUN} --out {folder} --resume {then}") == 0
    same, later = (
        load_file(tmp_path / folder / "weights.safetensors") for folder in ("same", "later")
    )
    assert same_bits(same, later)
    assert first_columns(tmp_path / "same" / "stages.csv") == STAGES
    assert first_columns(tmp_path / "later" / "stages.csv") == [STAGES[0], *STAGES[3:]]
    assert curves(tmp_path / "same" / "tensorboard")["train/loss"] == [6, 12]
    assert curves(tmp_path / "later" / "tensorboard")["train/loss"] == [12]


def test_a_window_behind_the_end_is_said(
    run_cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_cli(f"{RUN} --epochs 1 --out out --trace 100:110") == 0
    assert "fit took 8 ticks in all, and the first 100 are skipped" in caplog.text
    assert not (tmp_path / "out" / "trace.json").exists()


def test_without_tensorboard_no_run_begins(
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    assert run_cli(f"{MLP} --out out --tensorboard") == 2
    errors = capfd.readouterr().err
    assert "pip install tensorboard" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()
