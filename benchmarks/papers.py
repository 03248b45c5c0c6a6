"""The protocol of the FDG paper on CIFAR: its tables of test errors and of times, in one command.

    python -m benchmarks.papers --download [--devices 0,1,2,3] [--data-root FOLDER] [--tables stages]
    python -m benchmarks.papers --dry-run

For whoever has the data and the GPUs: most nets are trained for 300 epochs, three times in every way of
``benchmarks/published.json``. Each run is the command line's own ``train``, in a folder of its own under
``--folder``, and goes on from its checkpoint: the same command continues where it was stopped, trains
nothing twice, and keeps what is finished in ``benchmarks/results/papers.json``. Times come from short
runs. A run that fails (its loss became infinite, say) is listed so, and tried again by the next command.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.arguments import make_parser, parsed
from benchmarks.harness import write
from fdg_cuda.options import options_of
from fdg_cuda.settings import Settings

NAME = "papers"
PUBLISHED = Path(__file__).parent / "published.json"
TIMES = "times"
TIMED_EPOCHS = 4  # the first of which is not counted
WRONG_INPUT, INTERRUPTED = 2, 130  # exit codes of the command line that end this one, too
TERMINATED = 143


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        what: ``"errors"``, or ``"times"``: few epochs with a small learning rate, for their seconds.
        beta: None where there is nothing to shrink.
    """

    what: str
    data: str
    model: str
    method: str
    stages: int
    beta: float | None
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        beta = "" if self.beta is None else f"-beta{self.beta:g}"
        case = f"{self.data}-{self.model}-{self.method}-k{self.stages}{beta}"
        return f"{self.what}-{case}-{self.epochs}epochs-seed{self.seed}"


def published() -> dict[str, Any]:
    """What the papers report, each figure with its source."""
    found: dict[str, Any] = json.loads(PUBLISHED.read_text())
    return found


def data_of(table: str) -> str:
    """The data set of a table of errors."""
    return "cifar100" if table == "cifar100" else "cifar10"


def runs_of(given: argparse.Namespace) -> list[Run]:
    """All runs, in the order in which they are done: times first, then seed by seed."""
    if given.quick:
        ways = [("bp", 1, None), ("fdg", 2, 0.5)]
        return [Run("errors", "digits", "mlp", *way, given.epochs, 0) for way in ways]
    everything = published()
    runs: dict[Run, None] = {}  # several tables have the same runs
    if TIMES in given.tables:
        for row in everything["times"]["rows"]:
            way = _way(row, 0.5)
            runs[Run("times", "cifar10", row["model"], *way, TIMED_EPOCHS, 0)] = None
    for seed in range(given.seeds):
        for row in everything["errors"]:
            if row["table"] in given.tables:
                # DDG knows no shrinking.
                way = _way(row, row.get("beta", 1.0))
                data = data_of(row["table"])
                runs[Run("errors", data, row["model"], *way, given.epochs, seed)] = None
    return [run for run in runs if not given.models or run.model in given.models]


def _way(row: dict[str, Any], beta: float) -> tuple[str, int, float | None]:
    """Method, stages and beta of a row of published figures."""
    method = row["method"]
    return (method, 1, None) if method == "bp" else (method, row["stages"], beta)


def settings_of(run: Run, given: argparse.Namespace) -> dict[str, Any]:
    """What ``train`` is told, by the names of its settings."""
    protocol = published()["protocol"]["settings"]
    share = run.epochs / protocol["epochs"]
    settings = {
        "data": run.data,
        "model": run.model,
        "method": run.method,
        "devices": spread_over(given.devices, run.stages),
        "epochs": run.epochs,
        "seed": run.seed,
        **{key: protocol[key] for key in ("batch_size", "momentum", "weight_decay")},
    }
    if run.beta is not None:
        settings |= {"beta": run.beta, "backward_weights": given.backward_weights}
    if run.what == "times":
        return settings | {"lr": 0.01, "lr_schedule": "constant", "warmup_epochs": 0}
    milestones = sorted({int(share * milestone) for milestone in protocol["milestones"]} - {0})
    return settings | {
        "lr": protocol["lr"],
        "lr_decay": protocol["lr_decay"],
        "warmup_epochs": given.warmup_epochs,
        **({"milestones": tuple(milestones)} if milestones else {}),
    }


def spread_over(devices: Sequence[int | str], stages: int) -> tuple[int | str, ...]:
    """A device per stage: the first ones, or, where they are fewer, neighbours share one."""
    if len(devices) >= stages:
        return tuple(devices[:stages])
    return tuple(devices[stage * len(devices) // stages] for stage in range(stages))


def words_of(run: Run, given: argparse.Namespace) -> list[str]:
    """The command line of a run, behind ``python -m fdg_cuda``."""
    table = options_of(Settings)
    words = ["train"]
    for name, value in settings_of(run, given).items():
        words += table[name].words(value)
    if given.data_root is not None:
        words += ["--data-root", given.data_root]
    return [
        *words,
        *(["--download"] if given.download else []),
        *("--out", str(given.folder / run.name), "--resume"),
    ]


def train(words: Sequence[str]) -> tuple[int, str]:
    """The command line in a process of its own: its exit code, and the last line it complained with."""
    command = [sys.executable, "-m", "fdg_cuda", *words]
    stopped = False
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: deque[str] = deque(maxlen=1)
        while True:
            try:
                for line in process.stderr:
                    sys.stderr.write(line)
                    lines.extend(filter(None, [line.strip()]))
                code = process.wait()
                break
            except KeyboardInterrupt:
                # A terminal sent it to the run too, which stops at a checkpoint: that is waited for.
                stopped = True
            except BaseException:
                process.terminate()  # which stops it at a checkpoint, too
                raise
    if stopped:
        raise KeyboardInterrupt
    return code, lines[-1] if lines else f"exit code {code}"


# -- results --------------------------------------------------------------------------------------


def finished(run: Run, given: argparse.Namespace) -> dict[str, Any] | None:
    """What a run left, if it came to its end.

    Raises:
        SystemExit: its folder holds a run with other settings.
    """
    folder = given.folder / run.name
    try:
        recorded = json.loads((folder / "settings.json").read_text())["settings"]
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return None
    due = json.loads(json.dumps(settings_of(run, given)))
    del due["devices"]  # which do not matter to what is finished; train itself guards the rest
    other = [name for name, value in due.items() if recorded[name] != value]
    if other:
        raise SystemExit(
            f"{folder} holds a run with another {', '.join(other)} ({recorded[other[0]]}, not "
            f"{due[other[0]]}); give what it had, or another --folder"
        )
    if len(rows) < run.epochs:
        return None
    errors = [1 - float(row["test_accuracy"]) for row in rows]
    return {
        **asdict(run),
        "devices": recorded["devices"],
        "backward_weights": recorded["backward_weights"],
        "warmup_epochs": recorded["warmup_epochs"],
        "test_error": errors[-1],
        "best_test_error": min(errors),
        "seconds_per_epoch": statistics.median(
            [float(row["seconds"]) for row in rows[1:] or rows]  # the first one warms up
        ),
    }


def keep(runs: Iterable[Run], given: argparse.Namespace, failed: dict[str, str]) -> Path:
    """Write what is finished of ``runs``, and the ``failed`` ones with the reason."""
    found = {run.name: result for run in runs if (result := finished(run, given)) is not None}
    facts = {"epochs": given.epochs, "warmup_epochs": given.warmup_epochs}
    return write(
        NAME,
        {
            "settings": {**facts, "backward_weights": given.backward_weights},
            "runs": found,
            "failed": {name: why for name, why in failed.items() if name not in found},
        },
        given.out,
    )


def do(runs: Sequence[Run], given: argparse.Namespace, console: Console) -> None:
    """Every run that is not finished yet."""
    failed: dict[str, str] = {}
    # No live display: each run has its own on the same terminal.
    for number, run in enumerate(runs, 1):
        if finished(run, given) is not None:
            continue
        console.print(f"run {number} of {len(runs)}: {run.name}", markup=False, highlight=False)
        code, complaint = train(words_of(run, given))
        ended = finished(run, given) is not None
        if code == WRONG_INPUT:
            raise SystemExit(WRONG_INPUT)  # every other run would be refused, too
        if code == INTERRUPTED or (code == 0 and not ended):
            raise KeyboardInterrupt
        if not ended:
            failed[run.name] = complaint
        keep(runs, given, failed)
    console.print(f"written to {keep(runs, given, failed)}")


# -- the command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    everything = published()
    protocol = everything["protocol"]
    tables = [*everything["tables"], TIMES]
    models = sorted({row["model"] for row in everything["errors"]})
    parser = make_parser(__doc__, quick="digits, one epoch: only see that it works; needs --out")
    parser.add_argument("--dry-run", action="store_true", help="only show the runs and commands")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--models", nargs="+", choices=models, default=[], help="default: all")
    for name, default, what in (
        ("--seeds", protocol["runs"], "runs of each kind"),
        ("--epochs", protocol["settings"]["epochs"], "of each run"),
        ("--warmup-epochs", protocol["settings"]["warmup_epochs"], "at the beginning of each run"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{what}; default: {default}")
    parser.add_argument(
        "--backward-weights",
        choices=("stash", "current", "replay"),
        default="stash",
        help="default: stash",
    )
    parser.add_argument(
        "--devices",
        type=options_of(Settings)["devices"].accept,
        default=tuple(range(torch.cuda.device_count())) or (0,),
        help="such as 0,1,2,3; a run takes as many as it has stages; default: all CUDA devices",
    )
    parser.add_argument("--data-root", help="folder of the data; default: ./data")
    parser.add_argument("--download", action="store_true", help="let torchvision download them")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs") / NAME, help="where the runs are kept"
    )
    given = parsed(parser, arguments)
    if given.quick:
        given.epochs, given.folder, given.devices = 1, given.out / "runs", ("cpu", "cpu")
    for name in ("seeds", "epochs"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be 1 or more; got {getattr(given, name)}")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    console = Console(soft_wrap=True)
    runs = runs_of(given)
    most = max((run.stages for run in runs), default=0)
    if len(set(given.devices)) < most and not given.quick:
        console.print(
            f"Up to {most} stages share {', '.join(map(str, given.devices))}: their times are not to be "
            f"compared with the published ones, which had a device for each.",
            markup=False,
        )
    if given.dry_run:
        for run in runs:
            words = shlex.join(["python", "-m", "fdg_cuda", *words_of(run, given)])
            console.print(f"{run.name}\n  {words}", markup=False, highlight=False)
        console.print(f"{len(runs)} runs, {sum(run.epochs for run in runs):,} epochs")
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        do(runs, given, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
