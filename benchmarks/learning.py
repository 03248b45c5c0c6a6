"""Does ``fdg`` learn what BP learns? The same net, data, epochs and seed, trained both ways.

    python -m benchmarks.learning [--data fashion-mnist] [--model resnet20] [--epochs 3] [--seed 7]

Each run is the command line's own ``train``; the commands are in the result file.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import write
from fdg_cuda import models

METHODS = ("bp", "fdg")


def train(method: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run: its command and the rows of its metrics.csv."""
    arguments = [
        *("train", "--data", settings.data, "--model", settings.model, "--devices", "cpu,cpu"),
        *("--method", method, "--epochs", str(settings.epochs), "--seed", str(settings.seed)),
        *("--batch-size", "128", "--lr", str(settings.lr), "--warmup-epochs", "1"),
        *("--milestones", settings.milestones, "--beta", "0.5"),
    ]
    command = ["-m", "fdg_cuda", *arguments]
    subprocess.run([sys.executable, *command, "--out", str(folder / method)], check=True)
    with (folder / method / "metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {"command": shlex.join(["python", *command]), "epochs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--model", default="resnet20", choices=models.names())
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--milestones", default="2")
    parser.add_argument("--seed", type=int, default=7)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {method: train(method, settings, Path(folder)) for method in METHODS}
    final = {method: run["epochs"][-1]["test_accuracy"] for method, run in runs.items()}
    file = write("learning", {"settings": vars(settings), "runs": runs})
    console = Console()
    for method, accuracy in final.items():
        console.print(f"{method}: {100 * accuracy:.2f} % test accuracy")
    console.print(f"fdg - bp: {100 * (final['fdg'] - final['bp']):+.2f} points; written to {file}")


if __name__ == "__main__":
    main()
