"""Does ``fdg`` on one card learn what BP learns? As many epochs and seeds as fit into the time.

    python -m benchmarks.gpu_learning --out DIR [--minutes 8] [--data-root FOLDER]

BP and ``fdg`` in 2, 3 and 4 stages, with beta 0.5 and 1, each with the same seeds (first weights and
batches). Two epochs of each are timed first, and the number of epochs is planned for ``SEEDS`` seeds;
that number stays in ``DIR/gpu_learning.json`` with every finished run, so that the same command goes
on where it was stopped. ``--device cpu`` tries the program out on digits.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import learning_curves, learning_runs
from benchmarks.device_clock import Deadline
from benchmarks.harness import write
from benchmarks.learning_runs import BP, Way, key_of, shown
from fdg_cuda import FDGRunner, data, models
from fdg_cuda.files import replacing

NAME = "gpu_learning"
SEEDS, MOST_SEEDS = 3, 7
EPOCHS = (60, 50, 40, 30, 24, 20, 16, 12, 10, 8, 6, 4, 2, 1)
BATCH_SIZE, TEST_BATCH_SIZE = 128, 2500
LR = 0.1
CAREFUL_LR = 1e-3  # two epochs have no warm-up, and only their time counts
MARGIN = 1.1  # a run may take so much longer than it was measured to
AT_THE_END_S = 15.0

WAYS = [BP, *(Way("fdg", stages, beta) for beta in (0.5, 1.0) for stages in (2, 3, 4))]


@dataclass(frozen=True)
class Study:
    """Net, data and device.

    Attributes:
        test: the test set on the device, in large batches.
    """

    model: str
    spec: data.DataSpec
    is_cuda: bool
    test: list[tuple[torch.Tensor, torch.Tensor]]

    def runner(self, way: Way, seed: int, lr: float) -> FDGRunner:
        torch.manual_seed(seed)
        net = models.build(
            self.model,
            in_channels=self.spec.in_channels,
            num_classes=self.spec.num_classes,
            image_size=self.spec.image_size,
        )
        place: dict[str, Any] = {} if self.is_cuda else {"cpu_threads": way.stages}
        devices = [0 if self.is_cuda else "cpu"] * way.stages
        return FDGRunner(net, devices, method=way.method, beta=way.beta, lr=lr, **place)

    def train(self, way: Way, seed: int, epochs: int, lr: float = LR) -> dict[str, Any]:
        runner = self.runner(way, seed, lr)
        loader = data.BatchLoader(
            self.spec.train, BATCH_SIZE, shuffle=True, seed=seed, drop_last=True
        )
        run = learning_runs.train(runner, loader, self.test, epochs)
        return {"way": way.name, "seed": seed, **run}


def make_study(settings: argparse.Namespace) -> Study:
    is_cuda = settings.device == "cuda"
    spec = data.load("fashion-mnist" if is_cuda else "digits", settings.data_root)
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    test = [(x.to(device), y.to(device)) for x, y in data.BatchLoader(spec.test, TEST_BATCH_SIZE)]
    return Study("resnet20" if is_cuda else "mlp", spec, is_cuda, test)


# -- the plan -------------------------------------------------------------------------------------


def measure_cost(study: Study) -> dict[str, tuple[float, float]]:
    """Per way the seconds of a run's beginning, up to its first epoch's end, and of each epoch more."""
    costs = {}
    for way in WAYS:
        run = study.train(way, 0, 2, CAREFUL_LR)
        later = run["epochs"][-1]["seconds"] + run["epochs"][-1]["test_seconds"]
        costs[way.name] = (max(run["seconds"] - later, later), later)
    return costs


def cost_of_run(cost: tuple[float, float], epochs: int) -> float:
    return MARGIN * (cost[0] + (epochs - 1) * cost[1])


def planned_epochs(costs: dict[str, tuple[float, float]], seconds: float) -> int:
    """The most with which ``SEEDS`` runs of every way fit into ``seconds``."""
    for epochs in EPOCHS:
        if SEEDS * sum(cost_of_run(cost, epochs) for cost in costs.values()) <= seconds:
            return epochs
    return EPOCHS[-1]


# -- results --------------------------------------------------------------------------------------


def load(folder: Path, study: Study) -> dict[str, Any]:
    """What an earlier run of the same study left, or a beginning."""
    fresh: dict[str, Any] = {
        "model": study.model,
        "data": study.spec.name,
        "plan": None,
        "runs": {},
        "errors": {},
    }
    try:
        earlier: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text())
        same = all(earlier[key] == fresh[key] for key in ("model", "data"))
        return {key: earlier[key] for key in fresh} if same else fresh
    except (OSError, ValueError, KeyError, TypeError):
        return fresh


def save(folder: Path, settings: argparse.Namespace, results: dict[str, Any]) -> None:
    facts = {"device": settings.device, "lr": LR, "batch_size": BATCH_SIZE}
    found = learning_runs.summary(results["runs"], WAYS)
    write(NAME, {"settings": facts, "summary": found, **results}, folder)


# -- what people see ------------------------------------------------------------------------------


def draw(file: Path, results: dict[str, Any]) -> None:
    title = f"{results['model']} on {results['data']}"
    figure = learning_curves.draw(title, results["runs"], WAYS)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")


def show(console: Console, results: dict[str, Any]) -> None:
    epochs = (results["plan"] or {}).get("epochs", 0)
    table = Table(title=f"{results['model']} on {results['data']}, {epochs} epochs: test error, %")
    for heading in ("", "test error", "above bp, same seeds", "diverged"):
        table.add_column(heading)
    for name, row in learning_runs.summary(results["runs"], WAYS).items():
        table.add_row(name, *shown(name, row))
    console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data-root", default=None, help="folder of the data; default: ./data")
    settings = parser.parse_args(arguments)
    if settings.minutes <= 0:
        parser.error(f"--minutes must be above 0; got {settings.minutes:g}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu tries the program out on digits")
    return settings


def run_all(
    study: Study,
    results: dict[str, Any],
    deadline: Deadline,
    keep: partial[None],
    console: Console,
) -> None:
    """Every run of the plan that is not there yet, seed by seed, while time is left."""
    plan = results["plan"]
    seeds = MOST_SEEDS if study.is_cuda else 1
    for seed in range(seeds):
        for way in WAYS:
            key = key_of(way, seed)
            needed = cost_of_run(tuple(plan["costs"][way.name]), plan["epochs"])
            if key in results["runs"]:
                continue
            if study.is_cuda and deadline.left < needed:
                return
            try:
                results["runs"][key] = run = study.train(way, seed, plan["epochs"])
                results["errors"].pop(key, None)
                error = f"{100 * run['epochs'][-1]['test_error']:.2f} %" if run["epochs"] else "-"
                console.print(f"{key}: {error} ({deadline.left:.0f} s left)", markup=False)
            except Exception:
                results["errors"][key] = traceback.format_exc()
                console.print(traceback.format_exc(limit=-3), markup=False)
            keep()


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(arguments)
    console = Console()
    deadline = Deadline(60 * settings.minutes - AT_THE_END_S)
    study = make_study(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    results = load(settings.out, study)
    keep = partial(save, settings.out, settings, results)
    if results["plan"] is None:
        costs = measure_cost(study)
        epochs = planned_epochs(costs, deadline.left) if study.is_cuda else 1
        results["plan"] = {"epochs": epochs, "costs": costs}
        console.print(f"{epochs} epochs per run")
        keep()
    run_all(study, results, deadline, keep, console)
    keep()
    draw(settings.out / f"{NAME}.png", results)
    show(console, results)
    console.print(f"written to {settings.out}")


if __name__ == "__main__":
    main()
