"""What a run costs beside training: metrics, progress, checkpoints, validation.

    python -m benchmarks.overhead [--rounds 12] [--batches 100] [--quick] [--out FOLDER]

One model in one process on two CPU stages. In every round each case trains the same epoch and
evaluates the same batches, in an order drawn anew for every round: a slow moment of the machine meets
all of them, and so does what a case leaves to the one behind it. Ratios are taken within a round.

Training is timed from the call of ``fit`` to its return, files, fill and drain included. A checkpoint
behind every epoch is the command line's default; for those on the way (``every=``) the pipeline is
drained and filled again, which is no part of the goal. Validation is computation, so it is measured
against its floor: plain torch's forward over the same batches.
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import make_parser, parsed
from benchmarks.harness import quartiles, write
from fdg_cuda import Callback, Checkpoints, EpochResult, FDGRunner, FitStart, models
from fdg_cuda.metrics import BatchResult
from fdg_cuda.progress import PlainProgress, make_progress
from fdg_cuda.report import EpochRow, write_metrics

STAGES = 2
GOAL = 1.02
Batches = list[tuple[Tensor, Tensor]]

BARE = "fit alone"
REPORTED = "with metrics and progress"
KEPT = "with metrics, progress and a checkpoint"
DRAINED = "likewise, and checkpoints on the way"
EVALUATE, FLOOR = "evaluate", "plain forward of the same batches"
TOGETHER, NOTHING = "all of it, with validation", "fit alone and plain forward"
# Of a round's seconds: each the first over the second.
RATIOS: list[tuple[str, str, float | None]] = [
    (REPORTED, BARE, None),
    (KEPT, BARE, None),
    (DRAINED, BARE, None),
    (EVALUATE, FLOOR, None),
    (TOGETHER, NOTHING, GOAL),
]


@dataclass(frozen=True)
class Task:
    """What is trained. ``every``: batches between checkpoints on the way."""

    model: str = "resnet20"
    batch_size: int = 128
    batches: int = 100
    validation_batches: int = 20
    every: int = 50
    rounds: int = 12
    threads: int = STAGES


QUICK = Task(batch_size=4, batches=6, validation_batches=2, every=3, rounds=2)


class Reports(Callback):
    """What the training command does for people, but for the test and the weights file."""

    def __init__(self, folder: Path, progress: PlainProgress) -> None:
        self._folder = folder
        self._progress = progress
        self._rows: list[EpochRow] = []

    def on_fit_start(self, start: FitStart) -> None:
        self._progress.start(start)

    def on_batch_end(self, result: BatchResult) -> None:
        self._progress.batch(result)

    def on_epoch_end(self, result: EpochResult) -> None:
        row = EpochRow(
            epoch=result.epoch + 1,
            lr=0.0,
            train_loss=result.loss,
            train_accuracy=result.accuracy,
            test_loss=0.0,
            test_accuracy=None,
            seconds=result.seconds,
            samples_per_second=result.samples / result.seconds,
            data_wait=result.data_wait,
            busy=result.busy,
        )
        self._rows.append(row)
        write_metrics(self._folder / "metrics.csv", self._rows)
        self._progress.epoch(row)


class Overhead:
    """The cases, ready to take turns."""

    def __init__(self, task: Task, folder: Path) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(task.threads)
        self._task = task
        self._folder = folder
        self._model = models.build(task.model)
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._data = _images(task.batches, task.batch_size)
        self._validation = _images(task.validation_batches, task.batch_size)
        self._runner = FDGRunner(
            self._model, ["cpu"] * STAGES, lr=0.0, cpu_threads=task.threads
        )  # lr: random images teach nothing, and must not diverge
        self.cases: dict[str, Callable[[], object]] = {
            BARE: lambda: self._runner.fit(self._data),
            REPORTED: lambda: self._fit(None),
            KEPT: lambda: self._fit(Checkpoints(folder / "kept", overwrite=True)),
            DRAINED: lambda: self._fit(
                Checkpoints(folder / "drained", every=task.every, overwrite=True)
            ),
            EVALUATE: lambda: self._runner.evaluate(self._validation),
            FLOOR: self._plain_forward,
        }
        for case in self.cases.values():
            case()

    @property
    def split(self) -> list[int]:
        """Where it was cut."""
        assert self._runner.split is not None
        return self._runner.split

    def round(self, number: int) -> dict[str, float]:
        """Seconds of each case, in the order of that round."""
        names = list(self.cases)
        random.Random(number).shuffle(names)
        seconds = {}
        for name in names:
            begin = time.perf_counter()
            self.cases[name]()
            seconds[name] = time.perf_counter() - begin
        seconds[TOGETHER] = seconds[KEPT] + seconds[EVALUATE]
        seconds[NOTHING] = seconds[BARE] + seconds[FLOOR]
        return seconds

    def _fit(self, checkpoints: Checkpoints | None) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        progress = make_progress(console, 1, self._task.batches, lambda: self._runner.shares)
        with progress:
            self._runner.fit(
                self._data, callbacks=[Reports(self._folder, progress)], checkpoints=checkpoints
            )

    def _plain_forward(self) -> None:
        self._model.eval()
        with torch.no_grad():
            for x, _ in self._validation:
                self._model(x)
        self._model.train()


def _images(count: int, batch_size: int) -> Batches:
    return [
        (
            torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last),
            torch.randint(0, 10, (batch_size,)),
        )
        for _ in range(count)
    ]


def measure(task: Task, console: Console) -> dict[str, Any]:
    """What goes into the result file."""
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            overhead = Overhead(task, Path(folder))
            rounds = [
                overhead.round(number)
                for number in track(range(task.rounds), "rounds", console=console)
            ]
    finally:
        torch.set_num_threads(threads)
    steps = dict.fromkeys((BARE, REPORTED, KEPT, DRAINED), task.batches)
    steps |= dict.fromkeys((EVALUATE, FLOOR), task.validation_batches)
    return {
        "settings": {**vars(task), "stages": STAGES, "split": overhead.split},
        "seconds_per_batch": {
            name: quartiles([seconds[name] / count for seconds in rounds])
            for name, count in steps.items()
        },
        "ratios": [
            {"of": a, "to": b, "goal": goal, **quartiles([s[a] / s[b] for s in rounds])}
            for a, b, goal in RATIOS
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=Task.rounds)
    parser.add_argument("--batches", type=int, default=Task.batches, help="per epoch")
    given = parsed(parser, arguments)
    task = QUICK if given.quick else Task(rounds=given.rounds, batches=given.batches)
    console = Console()
    results = measure(task, console)
    show(console, results)
    console.print(f"written to {write('overhead', results, given.out)}")


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table("case", "seconds per batch", "quartiles")
    for name, q in results["seconds_per_batch"].items():
        table.add_row(name, f"{q['median']:.4f}", f"{q['q1']:.4f} to {q['q3']:.4f}")
    console.print(table)
    table = Table("ratio, within a round", "median", "quartiles", "goal")
    for r in results["ratios"]:
        goal = f"at most {r['goal']}" if r["goal"] else ""
        spread = f"{r['q1']:.4f} to {r['q3']:.4f}"
        table.add_row(f"{r['of']} / {r['to']}", f"{r['median']:.4f}", spread, goal)
    console.print(table)


if __name__ == "__main__":
    main()
