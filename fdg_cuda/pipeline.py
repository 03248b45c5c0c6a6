"""The running pipeline of one ``fit``: scheduler, program and stages at work."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from fdg_cuda._core import Scheduler, keep_freed_memory, return_freed_memory
from fdg_cuda.batches import Batch
from fdg_cuda.chain import check_loss
from fdg_cuda.errors import NonFiniteLossError
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.metrics import count_correct
from fdg_cuda.optim import DelayedSGD
from fdg_cuda.program import Program
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.stage import Stage
from fdg_cuda.timeline import Lane

LossFunction = Callable[[Tensor, Tensor], Tensor]
MAX_TICKS_IN_FLIGHT = 4

# Held by whoever changes torch's default number of intra-op threads, or relies on it.
torch_threads = threading.Lock()


class Pipeline:
    """Threads and memory of one ``fit``; ``close`` ends them whatever happened.

    Args:
        schedule: the rule.
        stages: one per device.
        loss_fn: mean loss of a batch.
        optimizer: where the hyper-parameters of a batch are read when it enters.
        threads: intra-op threads per stage.
        stash: whether each slot has its own weight copy.
        interrupts: allowed while ticks run, held while state changes hands.
        recorder: of the ticks, while they are traced.
        delays: (seed, longest in microseconds) of the sleeps put before every action, for tests.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        loss_fn: LossFunction,
        optimizer: DelayedSGD,
        *,
        threads: int,
        stash: bool,
        interrupts: Interrupts,
        recorder: Recorder | None = None,
        delays: tuple[int, int] = (0, 0),
    ) -> None:
        self._schedule = schedule
        self._stages = list(stages)
        self._loss_fn = loss_fn
        self._interrupts = interrupts
        self._recorder = recorder
        self._optimizer = optimizer
        self._shrinks = [schedule.shrinks(stage) for stage in range(schedule.stages)]
        # A row is written when its batch enters, at most MAX_TICKS_IN_FLIGHT ticks ahead of the
        # oldest tick at work, and read last `latency` ticks after the batch's own.
        rows = schedule.latency + MAX_TICKS_IN_FLIGHT + 1
        self._hyper = np.zeros((rows, 4 + schedule.stages))
        self._targets: dict[int, Tensor] = {}
        self._epoch = 0
        # (loss, samples, correct) of this epoch's batches, in order
        self.results: list[tuple[float, int, int | None]] = []
        # Before the stages' threads start: a thread keeps the arena it begins with.
        if os.environ.get("FDG_KEEP_FREED_MEMORY", "1") != "0":
            keep_freed_memory()
        self._lanes = [Lane(stage, f"stage {stage}") for stage in range(schedule.stages)]
        self._scheduler = Scheduler(
            "cpu",
            [lane.name for lane in self._lanes],
            max_ticks_in_flight=MAX_TICKS_IN_FLIGHT,
            delay_seed=delays[0],
            max_delay_us=delays[1],
        )
        try:
            self._set_threads(threads)
            for stage in self._stages:
                stage.begin_fit(hyper=self._hyper, threads=threads)
            self._stages[-1].loss = self._loss
            self._program = Program(schedule, self._scheduler, self._stages, stash=stash)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all threads. What has not begun is dropped."""
        self._scheduler.close()
        for stage in self._stages:
            stage.end_fit()
        self._targets.clear()
        return_freed_memory()

    def run_epoch(
        self,
        number: int,
        batches: Iterator[Batch],
        *,
        entered: Callable[[], object],
        known: Callable[[int], object],
    ) -> None:
        """Train one epoch.

        ``entered`` is called after each batch entered and before the next one is read; ``known``
        after every tick that was enqueued, and when all are done, with the number of batches whose
        results are there whatever the timing. However this ends, nothing is
        running afterwards and the caller's parameters hold the newest weights.
        """
        self._epoch = number
        self.results.clear()
        for stage in self._stages:
            stage.begin_epoch(self._schedule.first_slot(stage.index))
        snapshots = [stage.snapshot() for stage in self._stages]
        drained = False
        try:
            # Two steps, so that an interrupt on the way to `hold` still meets the outer one.
            try:
                self._interrupts.allow()
                self._run_ticks(batches, entered, known)
                self._scheduler.synchronize()
                known(len(self.results))
                drained = True
            finally:
                self._interrupts.hold()
                if self._recorder is not None:
                    self._recorder.end_epoch(self._scheduler, self._lanes, drained=drained)
            self._check_weights()
        except NonFiniteLossError:
            self._scheduler.close()
            for stage, snapshot in zip(self._stages, snapshots, strict=True):
                stage.restore(snapshot)
            raise
        finally:
            if not drained:
                self._scheduler.close()
            for stage in self._stages:
                stage.end_epoch()

    def _run_ticks(
        self,
        batches: Iterator[Batch],
        entered: Callable[[], object],
        known: Callable[[int], object],
    ) -> None:
        # Behind the enqueuing of a tick this many ticks, and so many batches, are surely done.
        behind = MAX_TICKS_IN_FLIGHT + self._schedule.forward_tick(self._schedule.stages - 1, 0)
        total: int | None = None
        for tick in count():
            if total is None:
                batch = next(batches, None)
                if batch is None:
                    total = tick
                else:
                    self._enter(tick, batch)
            if total is not None and tick >= total + self._schedule.latency:
                return
            if self._recorder is not None:
                self._recorder.before_tick(self._scheduler, tick)
            self._program.submit(tick, total)
            if total is None:
                entered()
            done = tick - behind + 1
            known(max(0, done if total is None else min(done, total)))

    def _check_weights(self) -> None:
        for stage in self._stages:
            if not stage.memory.newest_weights.isfinite().all():
                last = len(self.results) - 1
                raise NonFiniteLossError(
                    self.results[last][0], last, self._epoch, f"weights of stage {stage.index}"
                )

    def _enter(self, number: int, batch: Batch) -> None:
        row = self._optimizer.hyper_row(self._shrinks)
        self._hyper[number % len(self._hyper)] = row
        # Copies: a loader may refill the tensors it gave while they are still in the pipeline.
        self._stages[0].inputs[number] = batch[0].detach().clone()
        self._targets[number] = batch[1].detach().clone()

    def _loss(self, output: Tensor, batch: int) -> Tensor:
        """Runs on the last stage's stream."""
        target = self._targets.pop(batch)
        loss = self._loss_fn(output, target)
        check_loss(loss, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(value, batch, self._epoch)
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
