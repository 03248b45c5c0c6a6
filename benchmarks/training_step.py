"""Whole training steps, side by side: BP in plain torch against ``fdg`` on CPU devices.

    python -m benchmarks.training_step [--model resnet56] [--batch-size 128] [--rounds 8]
                                       [--quick] [--out FOLDER]

``fdg`` is cut between two children (residual blocks), and where what the layers take predicts that a
cut inside one is faster (``capture=True``), there too, as a case of its own. Every case lives in a
process of its own, warm, and they take turns step by step, so that a slow moment of the machine meets
all of them. Ratios are taken within a round. ``fdg`` is timed in the
steady state: from one batch's loss to the next, with every stage at work on one.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.arguments import make_parser, parsed, settings_of
from benchmarks.cuts import STAGES, measured_cuts
from benchmarks.harness import quartiles, write
from benchmarks.steps import HYPER, SteadyRunner, plain_step
from benchmarks.turns import Player
from fdg_cuda import FDGRunner, models
from fdg_cuda._core import Work, keep_freed_memory
from fdg_cuda.cpu_stage import CpuStage
from fdg_cuda.layout import Step
from fdg_cuda.stage import Stage

STEPS = 3  # timed steps per round and case
QUICK = {"model": "mlp", "batch_size": 2, "rounds": 2}
WARM_UP = 3  # steps before them, in which the allocator gets its memory back from the system
LIMIT_SECONDS = 600.0  # for a turn

Steps = Callable[[], list[float]]


def make(settings: argparse.Namespace) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = models.build(settings.model)
    x = torch.randn(settings.batch_size, 3, 32, 32)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return model, (x, torch.randint(0, 10, (settings.batch_size,)))


def bp(settings: argparse.Namespace, threads: int) -> Steps:
    """Plain torch: forward, backward, ``torch.optim.SGD``."""
    torch.set_num_threads(threads)
    model, batch = make(settings)
    optimizer = torch.optim.SGD(model.parameters(), **HYPER)

    def steps() -> list[float]:
        seconds = []
        for _ in range(WARM_UP):
            plain_step(model, optimizer, batch)
        for _ in range(STEPS):
            begin = time.perf_counter()
            plain_step(model, optimizer, batch)
            seconds.append(time.perf_counter() - begin)
        return seconds

    return steps


def runner_of(
    settings: argparse.Namespace,
    stages: int,
    *,
    method: str = "fdg",
    inside: bool = False,
    threads: int | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> FDGRunner:
    model, _ = make(settings)
    return FDGRunner(
        model,
        ["cpu"] * stages,
        method=method,
        split=settings.inside if inside else settings.split,
        capture=inside,
        cpu_threads=threads or stages,
        loss_fn=loss_fn,
        **HYPER,
    )


def fdg(settings: argparse.Namespace, stages: int, *, inside: bool = False) -> Steps:
    """The runner, one core per stage. ``inside``: cut inside a child."""
    _, batch = make(settings)
    steady = SteadyRunner(
        lambda loss_fn: runner_of(settings, stages, inside=inside, loss_fn=loss_fn),
        batch,
    )
    steady.runner.fit([batch])
    return partial(steady.seconds, WARM_UP, STEPS)


def stages_alone(settings: argparse.Namespace, stages: int) -> Steps:
    """The slowest stage's forward, backward and update on one core, with no other stage at work.

    In ``bp`` the stages take turns, so timing their actions there times each of them alone.
    """
    runner = runner_of(settings, stages, method="bp", threads=1)
    _, batch = make(settings)
    spent: dict[int, dict[int, float]] = {stage: {} for stage in range(stages)}
    runner.fit([batch])
    for stage in runner.stages:
        time_actions(stage, spent[stage.index])

    def steps() -> list[float]:
        runner.fit([batch] * (WARM_UP + STEPS))
        timed = range(WARM_UP, WARM_UP + STEPS)
        slowest = max(spent, key=lambda stage: sum(spent[stage][number] for number in timed))
        seconds = [spent[slowest][number] for number in timed]
        for times in spent.values():
            times.clear()
        return seconds

    return steps


def parts_at_once(settings: argparse.Namespace, stages: int) -> Steps:
    """The same parts as a thread each of plain torch, one core each, that exchange nothing and never
    wait: what no runtime with this cut can beat on this machine."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model, (x, y) = make(settings)
    bounds = [0, *settings.split, len(model)]
    assert len(bounds) == stages + 1
    parts = [model[a:b] for a, b in pairwise(bounds)]
    inputs, errors = [x], []
    for part in parts:
        output = part(inputs[-1]).detach()
        errors.append(torch.randn_like(output))
        inputs.append(output)
    start = threading.Barrier(stages)

    def train(number: int) -> float:
        """Seconds per step."""
        torch.get_num_threads()  # or the thread's first use of its count resets it
        torch.set_num_threads(1)
        optimizer = torch.optim.SGD(parts[number].parameters(), **HYPER)
        start.wait()
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                begin = time.perf_counter()
            optimizer.zero_grad()
            output = parts[number](inputs[number].detach().requires_grad_(number > 0))
            if number < stages - 1:
                torch.autograd.backward([output], [errors[number]])
            else:
                torch.autograd.backward(F.cross_entropy(output, y))
            optimizer.step()
        return (time.perf_counter() - begin) / STEPS

    def steps() -> list[float]:
        with ThreadPoolExecutor(stages) as pool:
            return [max(pool.map(train, range(stages)))]

    return steps


def time_actions(stage: Stage, spent: dict[int, float]) -> None:
    """Add to ``spent[batch]`` the seconds of every action of ``stage``."""
    plain = stage.work

    def work(step: Step) -> Callable[[int], None]:
        inner = plain(step)
        if isinstance(inner, Work):
            assert isinstance(stage, CpuStage)
            update = stage.native_sgd.run_update
            inner = partial(update, 0, 0)

        def timed(batch: int) -> None:
            begin = time.perf_counter()
            if inner is not None:
                inner(batch)
            spent[batch] = spent.get(batch, 0.0) + time.perf_counter() - begin

        return timed

    stage.work = work  # type: ignore[method-assign]


INSIDE = "fdg K=2, cut inside a block"
CASES: dict[str, Callable[[argparse.Namespace], Steps]] = {
    "bp, 1 core": lambda settings: bp(settings, 1),
    "bp, 2 cores": lambda settings: bp(settings, 2),
    "fdg K=2, 1 core each": lambda settings: fdg(settings, STAGES),
    INSIDE: lambda settings: fdg(settings, STAGES, inside=True),
    "slowest stage alone, 1 core": lambda settings: stages_alone(settings, STAGES),
    "both parts at once, nothing exchanged": lambda settings: parts_at_once(settings, STAGES),
}
RATIOS: list[tuple[str, str, float | None]] = [
    ("fdg K=2, 1 core each", "bp, 1 core", 0.52),
    ("fdg K=2, 1 core each", "bp, 2 cores", 0.92),
    (INSIDE, "bp, 1 core", 0.52),
    (INSIDE, "bp, 2 cores", 0.92),
    ("fdg K=2, 1 core each", "slowest stage alone, 1 core", 1.03),
    ("fdg K=2, 1 core each", "both parts at once, nothing exchanged", None),
    ("both parts at once, nothing exchanged", "bp, 2 cores", None),
]


def warm(name: str, settings: argparse.Namespace) -> Steps:
    steps = CASES[name](settings)
    steps()
    return steps


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="resnet56", choices=models.names())
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--name", default="training_step", help="of the result file")
    given = parsed(parser, arguments)
    settings = settings_of(given, QUICK)
    console = Console()
    vars(settings).update(asdict(measured_cuts(*make(settings))))
    names = [name for name in CASES if name != INSIDE or settings.inside]
    players = {name: Player([partial(warm, name, settings)], LIMIT_SECONDS) for name in names}
    for player in players.values():
        player.get_ready()  # one after the other: warm-ups must not disturb each other
    rounds: list[dict[str, float]] = []
    for _ in track(range(settings.rounds), "rounds", console=console):
        rounds.append({name: statistics.median(p.turn()[0].value) for name, p in players.items()})
    for player in players.values():
        player.stop()

    cases = {name: quartiles([r[name] for r in rounds]) for name in names}
    ratios = [
        {"of": a, "to": b, "goal": goal, **quartiles([r[a] / r[b] for r in rounds])}
        for a, b, goal in RATIOS
        if {a, b} <= cases.keys()
    ]
    file = write(
        settings.name,
        {"settings": vars(settings), "seconds_per_step": cases, "ratios": ratios},
        given.out,
    )
    show(console, settings, cases, ratios)
    console.print(f"written to {file}")


def show(
    console: Console,
    settings: argparse.Namespace,
    cases: dict[str, dict[str, float]],
    ratios: list[dict[str, Any]],
) -> None:
    table = Table(title=f"{settings.model}, batch {settings.batch_size}: seconds per step")
    for heading in ("case", "median", "quartiles"):
        table.add_column(heading)
    for name, q in cases.items():
        table.add_row(name, f"{q['median']:.3f}", f"{q['q1']:.3f} to {q['q3']:.3f}")
    console.print(table)
    table = Table(title="ratios, within a round")
    for heading in ("ratio", "median", "quartiles", "goal"):
        table.add_column(heading)
    for r in ratios:
        table.add_row(
            f"{r['of']} / {r['to']}",
            f"{r['median']:.3f}",
            f"{r['q1']:.3f} to {r['q3']:.3f}",
            f"at most {r['goal']}" if r["goal"] else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()
