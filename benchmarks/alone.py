"""The stages of a pipeline one action at a time: what each takes with the machine to itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from fdg_cuda._core import Scheduler, Span
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.cpu_stage import CpuStage
from fdg_cuda.cpu_threads import set_threads_of_streams
from fdg_cuda.freed_memory import KeptMemory
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hyper import HyperTable
from fdg_cuda.layout import CpuLayout, Step
from fdg_cuda.machine import CpuMachine
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.optim import DelayedSGD
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT
from fdg_cuda.precision import Precision
from fdg_cuda.program import Program
from fdg_cuda.schedule import Action, Schedule

TURN = "turn"
MODE = BackwardWeights.STASH


class OneByOne(CpuLayout):
    """Every step waits for the one before it, whatever stage that is of."""

    def is_shared(self, buffer: str) -> bool:
        return buffer == TURN or super().is_shared(buffer)

    def steps(self, action: Action) -> Iterator[Step]:
        for step in super().steps(action):
            yield replace(step, writes=(*step.writes, TURN))


def machine(stages: int, cpu_threads: int | None = None) -> CpuMachine:
    """What ``fdg`` on so many CPU devices runs on, with so many threads in all."""
    return CpuMachine(
        Schedule("fdg", stages),
        MODE,
        rule=UpdateRule(),
        precision=Precision.FLOAT32,
        cpu_threads=cpu_threads,
    )


def run_alone(
    model: nn.Sequential, split: Sequence[int], batch: Batch, batches: int, threads: int
) -> list[Span]:
    """Train ``batches`` times on ``batch``, with the runtime's own stages on their own threads in the
    order of ``fdg``, and no two actions at the same time.

    Args:
        split: where stages 1, 2, ... begin.
        batches: behind those during which slots are filled for the first time.
        threads: intra-op threads of every stage.

    Returns:
        When each action of the batches behind the first ones was at work.
    """
    bounds = [0, *split, len(model)]
    made = machine(len(split) + 1)
    schedule = made.schedule
    layers = list(model)
    stages = [
        stage
        for stage in made.make_stages([layers[a:b] for a, b in pairwise(bounds)])
        if isinstance(stage, CpuStage)
    ]
    # lr 0: random images teach nothing, and must not diverge.
    optimizer = DelayedSGD(model, lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=False, beta=0.5)
    shrinks = [schedule.shrinks(stage.index) for stage in stages]
    hyper = HyperTable(optimizer, schedule.latency + MAX_TICKS_IN_FLIGHT + 1, shrinks)
    layout = OneByOne(schedule, MODE)
    first = schedule.slots(0)
    total = first + batches
    with KeptMemory():  # as `fit` has it
        scheduler = Scheduler("cpu", layout.streams, max_ticks_in_flight=MAX_TICKS_IN_FLIGHT)
        try:
            set_threads_of_streams(scheduler, len(stages), threads)
            for stage in stages:
                stage.begin_fit(hyper=hyper, threads=threads)
                stage.begin_epoch(schedule.first_slot(stage.index), 0)
            stages[-1].loss = lambda output, _: cross_entropy(output, batch[1])
            program = Program(schedule, layout, scheduler, stages)
            scheduler.record_spans(True)
            for tick in range(schedule.ticks(total)):
                if tick < total:
                    hyper.enter(tick)
                    stages[0].inputs[tick] = batch[0]
                program.submit(tick, total)
            scheduler.synchronize()
            return [span for span in scheduler.take_spans() if span.batch >= first]
        finally:
            scheduler.close()
            for stage in stages:
                stage.end_epoch()
                stage.end_fit()
