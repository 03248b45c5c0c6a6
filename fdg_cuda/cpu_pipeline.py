"""The pipeline on CPU devices: a thread per stage, with its share of the cores."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fdg_cuda._core import Scheduler, keep_freed_memory, return_freed_memory
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.chain import check_loss
from fdg_cuda.cpu_stage import CpuStage
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.layout import CpuLayout
from fdg_cuda.metrics import count_correct
from fdg_cuda.optim import DelayedSGD
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT, LossFunction, Pipeline
from fdg_cuda.program import Program
from fdg_cuda.randomness import reroute_generator, restore_generator
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.timeline import Lane

# Held by whoever changes torch's default number of intra-op threads, or relies on it.
torch_threads = threading.Lock()


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
        optimizer: DelayedSGD,
        *,
        threads: int,
        mode: BackwardWeights,
        interrupts: Interrupts,
        recorder: Recorder | None = None,
        delays: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(
            schedule, stages, loss_fn, optimizer, interrupts=interrupts, recorder=recorder
        )
        self._stages = list(stages)
        self._targets: dict[int, Tensor] = {}
        # Before the stages' threads start: a thread keeps the arena it begins with.
        if os.environ.get("FDG_KEEP_FREED_MEMORY", "1") != "0":
            keep_freed_memory()
        self._rerouted = False
        layout = CpuLayout(schedule, mode)
        self._lanes = [Lane(layout.stage_of(i), name) for i, name in enumerate(layout.streams)]
        self._scheduler = Scheduler(
            "cpu",
            layout.streams,
            max_ticks_in_flight=MAX_TICKS_IN_FLIGHT,
            delay_seed=delays[0],
            max_delay_us=delays[1],
        )
        try:
            self._set_threads(threads)
            reroute_generator()
            self._rerouted = True
            for stage in self._stages:
                stage.begin_fit(hyper=self._hyper, threads=threads)
            self._stages[-1].loss = self._loss
            self._program = Program(schedule, layout, self._scheduler, self._stages)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        if self._rerouted:
            restore_generator()
            self._rerouted = False
        self._targets.clear()
        return_freed_memory()

    def _put(self, number: int, batch: Batch) -> None:
        self._stages[0].inputs[number] = batch[0].detach().clone()
        self._targets[number] = batch[1].detach().clone()

    def _loss(self, output: Tensor, batch: int) -> Tensor:
        """Runs on the last stage's stream."""
        target = self._targets.pop(batch)
        loss = self._loss_fn(output, target)
        check_loss(loss, self._first_batch + batch)
        value = loss.item()
        if not math.isfinite(value):
            raise self._non_finite(value, batch)
        self.results.append((value, len(target), count_correct(output.detach(), target)))
        return loss

    def _set_threads(self, threads: int) -> None:
        """Every stage's thread computes with ``threads`` intra-op threads from now on.

        torch makes the count set last, by whatever thread, the default of threads to come. So it is
        put back at once, and other runners are kept from reading it meanwhile.
        """
        with torch_threads:
            previous = torch.get_num_threads()
            try:
                self._set_threads_of_stages(threads)
            finally:
                torch.set_num_threads(previous)

    def _set_threads_of_stages(self, threads: int) -> None:
        def set_threads(_: int) -> None:
            torch.get_num_threads()  # or the thread's first use of its count resets it to the default
            torch.set_num_threads(threads)

        # One stage at a time: torch resizes a pool all threads share.
        for stage in range(self._schedule.stages):
            action = self._scheduler.add_action(
                code="T",
                stage=stage,
                slot=0,
                stream=stage,
                reads=[],
                writes=[],
                work=set_threads,
            )
            self._scheduler.submit(self._scheduler.add_tick([(action, 0)]), 0)
            self._scheduler.synchronize()
