"""Running the command line, and what it leaves."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.image import imread
from safetensors.torch import load_file

from fdg_cuda import models

ROOT = Path(__file__).resolve().parent.parent
FILES = {"metrics.csv", "curves.png", "weights.safetensors", "settings.json"}
PINNED = (
    "train --data digits --model resnet20 --devices cpu,cpu --epochs 4 --batch-size 128 --beta 0.5 "
    "--seed 7"
)
MLP = "train --model mlp --devices cpu,cpu"

Cli = Callable[[str], int]


def command(arguments: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "fdg_cuda", *shlex.split(arguments), *more]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def start(arguments: str, folder: Path, *, own_group: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_files(folder: Path, model: str) -> None:
    """Every file is there, whole, and the weights are those of the plain model."""
    assert {path.name for path in folder.iterdir()} - {"checkpoints"} == FILES
    assert imread(folder / "curves.png").shape[2] == 4
    plain = models.build(model, in_channels=1, num_classes=10, image_size=8)
    plain.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    json.loads((folder / "settings.json").read_text())
