"""`evaluate`: the figures of the run that wrote the weights, and what was predicted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from commands import Cli, metrics
from safetensors.torch import load_file

from fdg_cuda import data, models
from fdg_cuda.evaluate import evaluate_run

RUN = "train --model mlp --devices cpu,cpu --split 2 --epochs 1 --out out"


def test_the_figures_are_those_of_the_run_and_the_predictions_those_of_the_plain_model(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(RUN) == 0
    capfd.readouterr()
    assert run_cli("evaluate out --predictions told.csv") == 0
    (last,) = metrics(tmp_path / "out")
    result = evaluate_run(tmp_path / "out").result
    assert result.loss == float(last["test_loss"])
    assert result.accuracy == float(last["test_accuracy"])
    said = capfd.readouterr().out
    assert f"{result.loss:.6g}" in said
    assert "told.csv" in said
    test = data.load("digits").test
    plain = models.build("mlp", in_channels=1, num_classes=10, image_size=8).eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    with torch.no_grad():
        outputs = plain(torch.stack([test[i][0] for i in range(len(test))]))
    with (tmp_path / "told.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(len(test)))
    assert [int(row["label"]) for row in rows] == test.labels.tolist()
    assert [int(row["prediction"]) for row in rows] == outputs.argmax(1).tolist()
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == result.accuracy
    assert all(0.1 < float(row["probability"]) <= 1 for row in rows)


def test_other_devices_and_precision(run_cli: Cli, tmp_path: Path) -> None:
    assert run_cli(f"{RUN} --precision bfloat16") == 0
    (last,) = metrics(tmp_path / "out")
    assert evaluate_run(tmp_path / "out").result.loss == float(last["test_loss"])
    one = evaluate_run(tmp_path / "out", devices=("cpu",)).result
    assert one.loss == pytest.approx(float(last["test_loss"]), rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate nothing", "nothing has no settings.json; give the folder"),
        ("evaluate out --devices nowhere", "nowhere"),
        ("evaluate out", "does not hold the weights of this run"),
    ],
)
def test_what_is_no_run_is_refused(
    arguments: str, message: str, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "settings.json").write_text('{"model": "mlp", "data": "digits"}')
    (folder / "weights.safetensors").write_bytes(b"no weights")
    assert run_cli(arguments) == 2
    assert message in capfd.readouterr().err
