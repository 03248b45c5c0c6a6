"""The automatic cut beside every other cut there is.

    python -m benchmarks.auto_cut [--model resnet56] [--rounds 5] [--batches 8] [--quick] [--out FOLDER]

Two CPU stages. In the first round every cut trains the same batches; in the later ones, in another
order each, the cuts that were within ``--near`` of the fastest, and the automatic one. The goal is for
the automatic cut to take at most 1.03 of the time of the best, round by round. Capturing is measured
too: how long it takes from a model to its cut (goal: below 30 seconds).
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import make_parser, parsed, settings_of
from benchmarks.harness import quartiles, write
from fdg_cuda import FDGRunner, models

STAGES = 2
GOAL = 1.03
QUICK = {"model": "mlp", "batch_size": 2, "batches": 3, "rounds": 2}


def batches(count: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    batch = (torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,)))
    return [batch] * count


def seconds_of(
    model: str, split: list[int], data: list[tuple[Tensor, Tensor]], runners: dict[int, FDGRunner]
) -> float:
    """Per batch of an epoch, fill and drain included."""
    (at,) = split
    if at not in runners:
        torch.manual_seed(0)
        runners[at] = FDGRunner(models.build(model), ["cpu"] * STAGES, split=split, lr=0.0)
        runners[at].fit(data[:2])
    begin = time.perf_counter()
    runners[at].fit(data)
    return (time.perf_counter() - begin) / len(data)


def automatic(model: str, data: list[tuple[Tensor, Tensor]]) -> tuple[int, float]:
    """The cut, and how many seconds it took to find."""
    torch.manual_seed(0)
    runner = FDGRunner(models.build(model), ["cpu"] * STAGES, lr=0.0)
    begin = time.perf_counter()
    runner.fit(data[:1])
    assert runner.split is not None
    return runner.split[0], time.perf_counter() - begin


def measure(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    data = batches(given.batches, given.batch_size)
    auto, found_in = automatic(given.model, data)
    cuts = list(range(1, len(models.build(given.model))))
    runners: dict[int, FDGRunner] = {}
    first = {
        cut: seconds_of(given.model, [cut], data, runners)
        for cut in track(cuts, "every cut once", console=console)
    }
    limit = given.near * min(first.values())
    near = [cut for cut in cuts if first[cut] <= limit or cut == auto]
    rounds: list[dict[int, float]] = []
    for number in track(range(given.rounds), f"{len(near)} cuts near the best", console=console):
        order = random.Random(number).sample(near, len(near))
        rounds.append({cut: seconds_of(given.model, [cut], data, runners) for cut in order})
    medians = {cut: quartiles([r[cut] for r in rounds]) for cut in near}
    best = min(near, key=lambda cut: medians[cut]["median"])
    return {
        "settings": {**vars(given), "stages": STAGES},
        "automatic": auto,
        "best": best,
        "first_round": {str(cut): seconds for cut, seconds in first.items()},
        "seconds_per_batch": {str(cut): q for cut, q in medians.items()},
        "ratio": {"goal": GOAL, **quartiles([r[auto] / r[best] for r in rounds])},
        "first_fit_seconds": found_in,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="resnet56", choices=models.names())
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8, help="per epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--near", type=float, default=1.15, help="times the fastest cut's seconds")
    given = parsed(parser, arguments)
    settings = settings_of(given, QUICK)
    console = Console()
    results = measure(settings, console)
    table = Table("cut", "seconds per batch", "quartiles")
    for cut, q in sorted(results["seconds_per_batch"].items(), key=lambda e: e[1]["median"]):
        mark = " (automatic)" if int(cut) == results["automatic"] else ""
        table.add_row(cut + mark, f"{q['median']:.3f}", f"{q['q1']:.3f} to {q['q3']:.3f}")
    console.print(table)
    r = results["ratio"]
    console.print(
        f"automatic / best: {r['median']:.3f} ({r['q1']:.3f} to {r['q3']:.3f}), goal {GOAL}"
    )
    console.print(f"written to {write('auto_cut', results, given.out)}")


if __name__ == "__main__":
    main()
