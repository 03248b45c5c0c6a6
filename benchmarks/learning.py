"""Do delayed gradients learn what BP learns, and how large may their learning rate be?

    python -m benchmarks.learning [--seeds 3] [--epochs 10] [--quick --out FOLDER]

BP, ``fdg`` with beta 1 and 0.5, and ``ddg`` (which knows no shrinking) in 2, 3 and 4 stages, with the
same first weights and batches for every way of a seed; and for each way the largest learning rate with
which training is stable (:mod:`benchmarks.largest_lr`). Stages are threads on the CPU; the figures do
not depend on how they interleave, so that ``--jobs`` of these runs go on beside each other.

What is finished is in the result file at once. The same command goes on where it was stopped, and more
``--seeds`` add to what is there; other settings need ``--anew`` or another ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.arguments import make_parser, parsed
from benchmarks.harness import cpu_name, write
from benchmarks.learning_runs import key_of, shown, summary
from benchmarks.learning_study import MOMENTUM, WEIGHT_DECAY, Study, halved
from benchmarks.learning_verdicts import verdicts
from benchmarks.side_by_side import side_by_side
from fdg_cuda import data

NAME = "learning"
QUICK = Study("digits", 256, 8, epochs=1, batch_size=32, most_stages=2, probe_updates=8)
Task = tuple[str, str, Callable[[], dict[str, Any]]]  # the part of the results, the key, the work


def tasks(study: Study, seeds: int, root: Path | None) -> Iterator[Task]:
    """All there is to do. Seed by seed, so that what is there early is paired already."""
    for seed in range(seeds):
        for way in study.ways:
            yield "runs", key_of(way, seed), partial(study.train, way, seed, root)
        if seed == 0:
            for way in study.ways:
                yield "largest_lr", way.name, partial(study.search_lr, way, root)


def begun(file: Path, study: Study, anew: bool) -> dict[str, Any]:
    """What an earlier call with the same settings left in ``file``, or nothing yet.

    Raises:
        ValueError: it was left with others.
    """
    settings = {
        **asdict(study),
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "torch": torch.__version__,
        "cpu": cpu_name(),
    }
    fresh: dict[str, Any] = {"settings": settings, "runs": {}, "largest_lr": {}}
    if anew or not file.exists():
        return fresh
    try:
        found = json.loads(file.read_text())
        earlier = found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result of this program ({error}); --anew replaces it"
        ) from error
    others = [
        f"{name}: {earlier.get(name)} there, {value} now"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]
    if others:
        raise ValueError(
            f"{file} was made with other settings ({'; '.join(others)}); give those, or another "
            f"folder with --out, or --anew to replace it"
        )
    return {key: found[key] for key in fresh}


def run_all(
    todo: Sequence[Task], results: dict[str, Any], folder: Path, jobs: int, console: Console
) -> None:
    """Put what each task gives into ``results`` and the file, as they end."""
    with side_by_side([work for _, _, work in todo], jobs) as finished:
        for number, value in track(finished, "runs", len(todo), console=console):
            part, key, _ = todo[number]
            results[part][key] = value
            write(NAME, results, folder)
            console.print(f"{key}: {told(part, value)}", markup=False)


def told(part: str, value: dict[str, Any]) -> str:
    if part == "largest_lr":
        return f"largest stable learning rate {value['largest'] or 'below the grid'}"
    if value["diverged"]:
        return f"diverged in epoch {len(value['epochs']) + 1}"
    return f"test error {100 * value['epochs'][-1]['test_error']:.2f} % ({value['seconds']:.0f} s)"


def show(console: Console, study: Study, results: dict[str, Any], classes: int) -> None:
    table = Table("way", "test error", "points above bp, same seeds", "diverged", "largest lr")
    for name, row in summary(results["runs"], study.ways).items():
        largest = results["largest_lr"].get(name, {}).get("largest")
        table.add_row(name, *shown(name, row), f"{largest:.3g}" if largest else "")
    console.print(table)
    for verdict in verdicts(results["runs"], study.ways, classes):
        console.print(f"{verdict.claim}? {verdict.answer}: {verdict.because}", markup=False)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    for name in ("model_depth", "images", "epochs", "batch_size"):
        default = getattr(Study, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=None, help=f"default: {default}")
    parser.add_argument("--lr", type=float, default=None, help=f"default: {Study.lr}")
    parser.add_argument("--seeds", type=int, default=None, help="default: 3; --quick: 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other; default: 2")
    parser.add_argument("--data-root", type=Path, help="folder of the data; default: ./data")
    parser.add_argument("--download", action="store_true", help="download missing data into it")
    parser.add_argument("--anew", action="store_true", help="replace what is there")
    given = parsed(parser, arguments)
    for name in ("seeds", "jobs", "epochs", "batch_size"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    return given


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    names = ("model_depth", "images", "epochs", "batch_size", "lr")
    chosen = {name: value for name in names if (value := getattr(given, name)) is not None}
    study = replace(QUICK if given.quick else Study(), **chosen)
    folder: Path = given.out
    console = Console()
    try:
        results = begun(folder / f"{NAME}.json", study, given.anew)
        if given.download:  # once, before several processes want it
            data.load(study.data, given.data_root, download=True)
        spec = halved(study.data, study.images, given.data_root)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(str(error))
    results["settings"] |= {"classes": spec.num_classes, "image_size": spec.image_size}
    seeds = given.seeds or (1 if given.quick else 3)
    todo = [
        task for task in tasks(study, seeds, given.data_root) if task[1] not in results[task[0]]
    ]
    try:
        run_all(todo, results, folder, given.jobs, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on behind the runs that are finished")
        sys.exit(130)
    show(console, study, results, spec.num_classes)
    console.print(f"written to {folder / f'{NAME}.json'}")


if __name__ == "__main__":
    main()
