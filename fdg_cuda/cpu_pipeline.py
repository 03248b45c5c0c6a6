"""The pipeline on CPU devices: a thread per stage, with its share of the cores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fdg_cuda._core import Scheduler
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.chain import check_loss
from fdg_cuda.cpu_stage import CpuStage
from fdg_cuda.cpu_threads import Feeding, set_threads_of_streams
from fdg_cuda.freed_memory import KeptMemory
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.layout import CpuLayout
from fdg_cuda.loss_scale import LossScale
from fdg_cuda.metrics import count_correct
from fdg_cuda.nested import Nested, cloned, repacked, sample_count
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT, LossFunction, Pipeline
from fdg_cuda.program import Program
from fdg_cuda.randomness import reroute_generator, restore_generator
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.timeline import Lane


class CpuPipeline(Pipeline):
    """See :class:`Pipeline`.

    Args:
        threads: intra-op threads per stage.
        mode: which weights a backward uses.
        delays: (seed, longest in microseconds) of the sleeps put before every action, for tests.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[CpuStage],
        loss_fn: LossFunction,
        optimizer: DelayedOptimizer,
        *,
        threads: int,
        mode: BackwardWeights,
        interrupts: Interrupts,
        recorder: Recorder | None = None,
        loss_scale: LossScale | None = None,
        delays: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(
            schedule,
            stages,
            loss_fn,
            optimizer,
            interrupts=interrupts,
            recorder=recorder,
            loss_scale=loss_scale,
        )
        self._stages = list(stages)
        self._targets: dict[int, Nested] = {}
        self._rerouted = False
        layout = CpuLayout(schedule, mode)
        self._lanes = [Lane(layout.stage_of(i), name) for i, name in enumerate(layout.streams)]
        self._feeding: Feeding = Feeding(schedule.stages * threads)
        self._kept = KeptMemory()  # before the stages' threads start
        try:
            self._scheduler = Scheduler(
                "cpu",
                layout.streams,
                max_ticks_in_flight=MAX_TICKS_IN_FLIGHT,
                delay_seed=delays[0],
                max_delay_us=delays[1],
            )
        except BaseException:
            self._kept.close()
            raise
        try:
            set_threads_of_streams(self._scheduler, schedule.stages, threads)
            reroute_generator()
            self._rerouted = True
            for stage in self._stages:
                stage.begin_fit(
                    hyper=self._hyper,
                    threads=threads,
                    takes_turns=schedule.method == "bp" and schedule.stages > 1,
                )
            self._stages[-1].loss = self._loss
            self._program = Program(schedule, layout, self._scheduler, self._stages)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._kept:
            self._feeding.end()
            super().close()
            if self._rerouted:
                restore_generator()
                self._rerouted = False
            self._targets.clear()

    def _put(self, number: int, batch: Batch) -> None:
        self._stages[0].inputs[number] = cloned(batch[0])
        self._targets[number] = cloned(batch[1])

    def _loss(self, output: Nested, batch: int) -> Tensor:
        """Runs on the last stage's stream."""
        target = self._targets.pop(batch)
        # New containers: what the loss takes out of them still counts as samples.
        loss = self._loss_fn(output, repacked(target))
        check_loss(loss, self._first_batch + batch)
        value = loss.item()
        if not math.isfinite(value) and self._scales is None:
            raise self._non_finite(value, batch)
        self.results.append((value, sample_count(target), count_correct(output, target)))
        return loss
