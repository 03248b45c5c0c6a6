"""One net trained in several ways with the same seeds: what the studies of learning share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fdg_cuda import FDGRunner, data, lr_schedule
from fdg_cuda.errors import NonFiniteLossError
from fdg_cuda.metrics import EpochResult
from fdg_cuda.settings import Settings

Runs = Mapping[str, Mapping[str, Any]]  # by key_of


@dataclass(frozen=True)
class Way:
    """How a net is trained.

    Attributes:
        beta: shrinking factor; 1 where nothing is shrunk: in ``bp``, and in ``ddg`` as published.
    """

    method: str
    stages: int = 1
    beta: float = 1.0

    @property
    def name(self) -> str:
        return "bp" if self.method == "bp" else f"{self.method} K={self.stages} beta={self.beta:g}"

    @property
    def family(self) -> str:
        """What it has in common with ways of other numbers of stages."""
        return f"{self.method}, beta = {self.beta:g}"


BP = Way("bp")


def families(ways: Iterable[Way]) -> dict[str, list[Way]]:
    """The ways of each family, BP before them: what one panel or line shows."""
    found: dict[str, list[Way]] = {}
    for way in ways:
        if way != BP:
            found.setdefault(way.family, [BP]).append(way)
    return found


def key_of(way: Way, seed: int) -> str:
    return f"{way.name} seed={seed}"


def train(
    runner: FDGRunner,
    loader: data.BatchLoader,
    test: Sequence[tuple[Tensor, Tensor]],
    epochs: int,
) -> dict[str, Any]:
    """One run under the command line's own learning-rate schedule: a row per epoch that was finished,
    and why it diverged if it did."""
    settings = Settings(epochs=epochs).completed(threads=1)
    scheduler = lr_schedule.from_settings(runner.optimizer, settings, len(loader))
    rows: list[dict[str, Any]] = []

    def on_epoch(result: EpochResult) -> None:
        begin = time.perf_counter()
        accuracy = runner.evaluate(test).accuracy
        assert accuracy is not None
        rows.append(
            {
                "train_loss": result.loss,
                "test_error": 1 - accuracy,
                "seconds": result.seconds,
                "test_seconds": time.perf_counter() - begin,
            }
        )

    diverged = None
    begin = time.perf_counter()
    try:
        runner.fit(loader, epochs, lr_scheduler=scheduler, lr_step="batch", on_epoch=on_epoch)
    except NonFiniteLossError as error:
        diverged = str(error)
    seconds = time.perf_counter() - begin
    return {"epochs": rows, "diverged": diverged, "split": runner.split, "seconds": seconds}


# -- over seeds -----------------------------------------------------------------------------------


def finals(runs: Runs, way: Way) -> dict[int, float]:
    """Test error behind the last epoch by seed, of the runs that did not diverge."""
    return {
        run["seed"]: run["epochs"][-1]["test_error"]
        for run in runs.values()
        if run["way"] == way.name and not run["diverged"]
    }


def summary(runs: Runs, ways: Iterable[Way]) -> dict[str, Any]:
    """Of each way that was run: final test errors, their differences to BP's with the same seeds (both
    None if none ended), and how many runs diverged. Shares in [0, 1]."""
    found = {}
    bp = finals(runs, BP)
    for way in ways:
        done = [run for run in runs.values() if run["way"] == way.name]
        if not done:
            continue
        errors = finals(runs, way)
        above = [errors[seed] - bp[seed] for seed in errors if seed in bp]
        found[way.name] = {
            "test_error": _spread(list(errors.values())),
            "above_bp": _spread(above),
            "diverged": sum(run["diverged"] is not None for run in done),
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}


def shown(name: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The row ``name`` of :func:`summary` in percent: test error, points above BP, diverged runs."""
    error, above = row["test_error"], row["above_bp"]
    compared = above is not None and name != BP.name
    return (
        f"{100 * error['mean']:.2f} % (sd {_sd(error)}, n = {error['n']})"
        if error
        else "none ended",
        f"{100 * above['mean']:+.2f} (sd {_sd(above)})" if compared else "",
        str(row["diverged"] or ""),
    )


def _sd(spread: Mapping[str, float]) -> str:
    return f"{100 * spread['sd']:.2f}" if spread["n"] > 1 else "unknown"
