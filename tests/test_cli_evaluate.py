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


def test_a_model_of_ones_own(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Captured, cut, trained, and evaluated again from its files."""
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 32)\n"
        "        self.head = nn.Linear(32, 10)\n\n"
        "    def forward(self, x):\n"
        "        x = self.first(x.flatten(1)).relu()\n"
        "        return self.head(x + self.second(x).relu())\n"
    )
    train = "train --model own_nets:Net --devices cpu,cpu --epochs 1 --lr 0.1"
    assert run_cli(train) == 0
    out = tmp_path / "runs" / "digits-own_nets.Net-fdg-k2"
    row = metrics(out)[0]
    assert set(load_file(out / "weights.safetensors")) >= {"first.weight", "second.bias"}
    assert run_cli(f"evaluate {out}") == 0
    accuracy = f"{100 * float(row['test_accuracy']):.1f} %"
    assert f"test accuracy  {accuracy}" in capfd.readouterr().out
    assert run_cli("train --model resnet50") != 0
    assert "takes images of 3 channels, and these have 1" in " ".join(
        capfd.readouterr().err.split()
    )


def test_a_model_that_the_data_do_not_fit(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large_nets.py").write_text(
        "from torch import nn\n\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    train = "train --model large_nets:net --devices cpu,cpu --epochs 1"
    assert run_cli(train) == 2
    errors = " ".join(capfd.readouterr().err.split())
    assert (
        "large_nets:net cannot be trained on the first batch of digits, with 1x8x8 images of 10 classes"
        in errors
    )
    assert "mat1 and mat2" in errors
    assert not (tmp_path / "runs").exists()
    (tmp_path / "empty").mkdir()
    assert run_cli(f"{train} --out empty") == 2
    assert (tmp_path / "empty").is_dir(), "which was there before"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").touch()
    assert run_cli(f"{train} --out taken") == 2
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["note"]
