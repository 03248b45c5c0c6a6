"""What one stage does in a second, alone: the networks of the papers, cut where the runtime would.

    pytest benchmarks/bench_stage.py --benchmark-json FILE

Every stage is the runtime's own, with its slots, weight copies and native update, on its own thread
and with its share of the cores; but no two are at work at the same time (:mod:`benchmarks.alone`). The
cut is the best by measured times. ``samples_per_s`` counts forward, backward and update; what
a stage sends is handed over by reference on the CPU, so that bytes cost no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.alone import machine, run_alone
from benchmarks.harness import quartiles
from fdg_cuda import models
from fdg_cuda._core import Span
from fdg_cuda.costs import LayerCost
from fdg_cuda.cpu_threads import share_of_cores
from fdg_cuda.layer_chain import LayerChain
from fdg_cuda.layer_times import anew
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.schedule import Kind

STAGES = (2, 3, 4)
COMPUTE = {"forward": Kind.FORWARD, "backward": Kind.BACKWARD, "update": Kind.UPDATE}
SENDS = {"up": Kind.SEND_ACTIVATION, "down": Kind.SEND_ERROR}


@dataclass(frozen=True)
class Net:
    """A model, what it is trained on, and how often."""

    model: str
    batch_size: int
    batches: int
    image_size: int = 32

    def __str__(self) -> str:
        return self.model

    def make(self) -> nn.Sequential:
        torch.manual_seed(0)
        made = models.build(self.model, image_size=self.image_size)
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        y = torch.randint(0, 10, (self.batch_size,))
        return x.contiguous(memory_format=torch.channels_last), y


NETS = (Net("resnet20", 32, 40), Net("resnet56", 32, 20), Net("wrn28-10", 8, 6))
QUICK = (Net("mlp", 2, 3, image_size=4),)


@cache
def cuts(net: Net) -> dict[int, tuple[list[int], list[LayerCost]]]:
    """By the number of stages: the best cut, and what layers cost by which it was found."""
    chain, batch = LayerChain(net.make()), net.batch()
    found = {}
    with anew():
        for stages in STAGES:
            runs_on = machine(stages)
            cut = runs_on.best_cut(chain, batch, cross_entropy)
            found[stages] = cut.split, runs_on.layer_costs(chain.layers, batch, cross_entropy)
    return found


def stage_row(stage: int, spans: list[Span], batch_size: int) -> dict[str, Any]:
    """Of the ``spans`` of one stage: milliseconds per batch by what it does, and samples per second."""
    seconds: dict[str, dict[int, float]] = {}
    for span in spans:
        seconds.setdefault(span.code, {})[span.batch] = span.end_s - span.begin_s
    row: dict[str, Any] = {"stage": stage}
    for name, kind in (COMPUTE | SENDS).items():
        taken = list(seconds.get(kind.value, {}).values())
        row[f"{name}_ms"] = quartiles([1e3 * s for s in taken]) if taken else None
    steps = [
        sum(seconds[kind.value][batch] for kind in COMPUTE.values())
        for batch in seconds[Kind.UPDATE.value]
    ]
    row["samples_per_s"] = quartiles([batch_size / step for step in steps])
    return row


def results(
    net: Net, split: list[int], costs: list[LayerCost], spans: list[Span]
) -> dict[str, Any]:
    """The case's ``extra_info``."""
    rows = []
    for stage, end in enumerate([*split, None]):
        own = [span for span in spans if span.stage == stage]
        row = stage_row(stage, own, net.batch_size)
        row["up_bytes"] = 0 if end is None else costs[end - 1].output_bytes
        row["down_bytes"] = 0 if stage == 0 else costs[split[stage - 1]].error_bytes
        rows.append(row)
    return {
        "kind": "stage",
        "model": net.model,
        "batch_size": net.batch_size,
        "image_size": net.image_size,
        "stages": len(split) + 1,
        "split": split,
        "rows": rows,
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize("net", QUICK if quick else NETS, ids=str)
    metafunc.parametrize("stages", (2,) if quick else STAGES)


def test_stages_alone(benchmark: BenchmarkFixture, net: Net, stages: int) -> None:
    """One round: quartiles are over batches."""
    split, costs = cuts(net)[stages]
    threads = share_of_cores(None, stages)
    model, batch = net.make(), net.batch()

    def run() -> list[Span]:
        return run_alone(model, split, batch, net.batches, threads)

    spans: list[Span] = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(threads=threads, **results(net, split, costs, spans))
    for row in benchmark.extra_info["rows"]:
        print(f"  stage {row['stage']}: {row['samples_per_s']['median']:.0f} samples/s", end="")
