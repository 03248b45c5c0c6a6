"""The ways :mod:`benchmarks.compare` compares, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from benchmarks.compare_processes import PROCESSES, ddp, pipelining
from benchmarks.compare_trainers import Place, Published, Running, Trainer, bp, torchgpipe
from benchmarks.turns import resident_bytes

# Of a turn. Steps so long that this takes minutes are warm after the first.
WARM_UP_SECONDS, LEAST_WARM_UP = 0.3, 2
TIMED_SECONDS, LEAST_STEPS = 0.5, 2
LONG_STEP_SECONDS = 0.8

PLAIN, PEER, OURS, PUBLISHED = "plain torch", "pipeline of others", "this runner", "published"


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        label: for people.
        kind: ``PLAIN``, ``PEER``, ``OURS`` or ``PUBLISHED``.
        make: the trainer, in each of its ``processes``.
        parts: into which it divides a batch; batch norm sees one of them at a time.
        threads: intra-op threads of each process or stage.
        hops: whether its stages live in different processes.
        needs: a module that nothing else here needs; its memory is no part of the training's.
    """

    label: str
    kind: str
    make: Callable[[Place], Trainer]
    processes: int = 1
    parts: int = 1
    threads: int = 1
    hops: bool = False
    needs: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Of its processes. A count set later is for the thread that sets it: threads that torchgpipe or
        Python start would compute convolutions, which are not torch's own loops, with all cores."""
        return {"OMP_NUM_THREADS": str(self.threads)}


WAYS = {
    "bp-1": Way("BP, 1 thread", PLAIN, partial(bp, threads=1)),
    "bp-2": Way("BP, 2 threads", PLAIN, partial(bp, threads=2), threads=2),
    "bp-2-kept": Way(
        "BP, 2 threads, kept memory", PLAIN, partial(bp, threads=2, keep=True), threads=2
    ),
    "ddp": Way("DDP, 2 processes", PLAIN, ddp, PROCESSES, parts=PROCESSES),
    **{
        f"{schedule.lower()}-{count}": Way(
            f"{schedule}, {count} micro-batches",
            PEER,
            partial(pipelining, schedule=schedule, micro_batches=count),
            PROCESSES,
            parts=count,
            hops=True,
            needs="torch.distributed.pipelining",
        )
        for schedule in ("1F1B", "GPipe")
        for count in (4, 8)
    },
    "torchgpipe-4": Way(
        "torchgpipe, 4 chunks", PEER, partial(torchgpipe, chunks=4), parts=4, needs="torchgpipe"
    ),
    "published": Way("FDG, threads per batch", PUBLISHED, Published),
    "ddg": Way("fdg_cuda, ddg, K = 2", OURS, partial(Running, method="ddg")),
    "fdg": Way("fdg_cuda, fdg, K = 2", OURS, partial(Running, method="fdg")),
}


@dataclass(frozen=True)
class Turn:
    """What a way's process says after a turn. ``start_bytes``: resident before the model was made."""

    seconds_per_step: float
    start_bytes: int


def turn_of(step_seconds: float) -> tuple[int, int]:
    """How many steps to warm up and to time, by how long one takes."""
    if step_seconds > LONG_STEP_SECONDS:
        return 1, LEAST_STEPS
    return (
        max(LEAST_WARM_UP, math.ceil(WARM_UP_SECONDS / step_seconds)),
        max(LEAST_STEPS, math.ceil(TIMED_SECONDS / step_seconds)),
    )


def play(way: Way, place: Place) -> Callable[[int, int], Turn]:
    """Make the trainer; what it then does in a turn of so many steps to warm up and to time."""
    if way.needs:
        import_module(way.needs)
    start = resident_bytes("VmRSS")
    trainer = way.make(place)
    return lambda warm_up, steps: Turn(trainer.seconds_per_step(warm_up, steps), start)
