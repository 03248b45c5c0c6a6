"""The running pipeline of one ``fit``: scheduler, program and stages at work.

It trains *segments*: whole epochs, or parts of them between two points at which it is drained.

What differs between kinds of devices is in the subclasses: :mod:`fdg_cuda.cpu_pipeline` and
:mod:`fdg_cuda.cuda_pipeline`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import torch
from torch import Tensor

from fdg_cuda._core import Scheduler
from fdg_cuda.batches import Batch
from fdg_cuda.errors import NonFiniteLossError
from fdg_cuda.hyper import HyperTable
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.loss_scale import SMALLEST_SCALE, BatchScales, LossScale
from fdg_cuda.nested import Nested
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.program import Program
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.stage import Stage
from fdg_cuda.timeline import Lane
from fdg_cuda.update_measures import UpdateMeasures

LossFunction = Callable[[Nested, Nested], Tensor]
MAX_TICKS_IN_FLIGHT = 4
SHORTEST_WAIT = 1e-4  # seconds for a batch; below it asking the devices would take as long


class Pipeline(ABC):
    """Streams and memory of one ``fit``; ``close`` ends them whatever happened.

    Args:
        schedule: the rule.
        stages: one per device.
        loss_fn: mean loss of a batch.
        optimizer: where the hyper-parameters of a batch are read when it enters.
        interrupts: allowed while ticks run, held while state changes hands.
        recorder: of the ticks, while they are traced.
        loss_scale: for the losses; None: they are not scaled.
    """

    _scheduler: Scheduler
    _lanes: list[Lane]  # the scheduler's streams
    _program: Program
    _feeding: AbstractContextManager[None] = nullcontext()  # in which batches are read and taken in

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Stage],
        loss_fn: LossFunction,
        optimizer: DelayedOptimizer,
        *,
        interrupts: Interrupts,
        recorder: Recorder | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self._schedule = schedule
        self._all_stages = list(stages)
        self._loss_fn = loss_fn
        self._interrupts = interrupts
        self._recorder = recorder
        # What the host writes when a batch enters, at most MAX_TICKS_IN_FLIGHT ticks ahead of the
        # oldest tick at work, is read last `latency` ticks after the batch's own: so many rows.
        self._rows = schedule.latency + MAX_TICKS_IN_FLIGHT + 1
        shrinks = [schedule.shrinks(stage) for stage in range(schedule.stages)]
        self._loss_scale = loss_scale
        self._scales = None if loss_scale is None else self._make_scales(loss_scale)
        self._hyper = HyperTable(optimizer, self._rows, shrinks, self._scales)
        self._epoch = 0
        self._first_batch = 0  # of the segment, within the epoch
        self._entered = 0
        # (loss, samples, correct) of this segment's batches, in order
        self.results: list[tuple[float, int, int | None]] = []
        self.data_seconds = 0.0  # waited for the loader in this segment, with nothing left to do
        self._busy_before: list[float] | None = None  # per stream, when this segment began
        self._measures: UpdateMeasures | None = None

    # -- for the subclasses ---------------------------------------------------------------------

    @abstractmethod
    def _put(self, number: int, batch: Batch) -> None:
        """Take in the tensors of a batch that enters; the loader may refill them afterwards."""

    def _make_scales(self, loss_scale: LossScale) -> BatchScales:
        finite = torch.zeros(self._rows, self._schedule.stages, dtype=torch.bool)
        return BatchScales(
            loss_scale, finite, accumulate=self._schedule.accumulate, asynchronous=False
        )

    def _settle(self) -> None:
        """Wait for what was done to the stages' memory outside their streams."""

    def _gather(self, done: int) -> None:
        """Bring :attr:`results` up to at least ``done`` batches, which are trained."""

    @property
    def updates(self) -> int:
        """How many each stage had to make in this segment, those that were left out included."""
        return -(-len(self.results) // self._schedule.accumulate)

    @property
    def skipped(self) -> tuple[int, ...] | None:
        """Per stage, updates of this segment that were left out, as far as known; None where losses
        are not scaled."""
        return None if self._scales is None else tuple(self._scales.skipped)

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next batch is multiplied by; None: nothing."""
        return None if self._scales is None else self._scales.value

    def busy_seconds(self) -> tuple[float, ...] | None:
        """Per stage, how long actions were at work in this segment so far; None: not measured, or
        the streams have ended. Any thread may ask."""
        before = self._busy_before  # read first, so that it is never ahead
        try:
            now = self._scheduler.busy_seconds()
        except RuntimeError:  # closed
            return None
        if before is None or now is None:
            return None
        busy = [0.0] * self._schedule.stages
        for lane, end, begin in zip(self._lanes, now, before, strict=True):
            busy[lane.stage] += end - begin
        return tuple(busy)

    def measure_updates(self, measures: UpdateMeasures) -> None:
        """Let the stages measure their updates. Before the first segment."""
        self._measures = measures
        measures.begin_fit(self._schedule, [stage.replays for stage in self._all_stages])
        for stage in self._all_stages:
            stage.measure_updates(measures)

    def close(self) -> None:
        """End all streams. What has not begun is dropped."""
        self._scheduler.close()
        for stage in self._all_stages:
            stage.end_fit()

    def run_segment(
        self,
        epoch: int,
        first_batch: int,
        batches: Iterator[Batch],
        *,
        entered: Callable[[], object],
        known: Callable[[int], object],
    ) -> None:
        """Train ``batches``, which are those of ``epoch`` from ``first_batch`` on, and drain.

        ``entered`` is called after each batch entered and before the next one is read; ``known``
        after every tick that was enqueued, and when all are done, with the number of batches whose
        results are there whatever the timing. However this ends, nothing is
        running afterwards and the caller's parameters hold the newest weights.
        """
        self._epoch, self._first_batch = epoch, first_batch
        self._entered = 0
        self.data_seconds = 0.0
        self._busy_before = self._scheduler.busy_seconds()
        self.results.clear()
        if self._measures is not None:
            self._measures.begin_segment()
        for stage in self._all_stages:
            stage.begin_epoch(self._schedule.first_slot(stage.index), first_batch)
        snapshots = [stage.snapshot() for stage in self._all_stages]
        scale_before = None if self._loss_scale is None else self._loss_scale.state_dict()
        if self._scales is not None:
            self._scales.begin()
        self._settle()
        drained = False
        try:
            # Two steps, so that an interrupt on the way to `hold` still meets the outer one.
            try:
                self._interrupts.allow()
                self._run_ticks(batches, entered, known)
                self._scheduler.synchronize()
                self._gather(self._entered)
                self._learn(self._entered)
                known(len(self.results))
                self._end_measures()
                drained = True
            finally:
                self._interrupts.hold()
                if self._recorder is not None:
                    self._recorder.end_epoch(self._scheduler, self._lanes, drained=drained)
            self._check_weights()
        except NonFiniteLossError:
            self._scheduler.close()
            self._end_measures()
            for stage, snapshot in zip(self._all_stages, snapshots, strict=True):
                stage.restore(snapshot)
            if self._loss_scale is not None and scale_before is not None:
                self._loss_scale.load_state_dict(scale_before)
            raise
        finally:
            if not drained:
                self._scheduler.close()
            self._end_epoch()

    def _end_measures(self) -> None:
        """Nothing is running any more."""
        if self._measures is not None:
            self._measures.end_segment()

    def _end_epoch(self) -> None:
        for stage in self._all_stages:
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
                with self._feeding:
                    batch = self._read(batches)
                    if batch is None:
                        total = tick
                    else:
                        self._enter(tick, batch)
            if total is not None and tick >= self._schedule.ticks(total):
                return
            if self._recorder is not None:
                self._recorder.before_tick(self._scheduler, tick)
            self._program.submit(tick, total)
            if total is None:
                entered()
            done = tick - behind + 1
            done = max(0, done if total is None else min(done, total))
            self._gather(done)
            known(done)

    def _check_weights(self) -> None:
        for stage in self._all_stages:
            if not stage.memory.newest_weights.isfinite().all():
                last = len(self.results) - 1
                raise self._non_finite(
                    self.results[last][0], last, f"weights of stage {stage.index}"
                )

    def _non_finite(
        self, loss: float, batch: int, weights: str | None = None
    ) -> NonFiniteLossError:
        """The error to raise for ``batch`` of this segment."""
        return NonFiniteLossError(
            loss, self._first_batch + batch, self._epoch, weights, back_to=self._first_batch
        )

    def _read(self, batches: Iterator[Batch]) -> Batch | None:
        began = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - began
        if waited > SHORTEST_WAIT and self._scheduler.ticks_in_flight == 0:
            self.data_seconds += waited
        return batch

    def _enter(self, number: int, batch: Batch) -> None:
        # Batches that surely left the last of their stages, so that the scale of this one does not
        # depend on timing.
        self._learn(number - MAX_TICKS_IN_FLIGHT - self._schedule.latency)
        self._hyper.enter(number)
        self._put(number, batch)
        self._entered = number + 1

    def _learn(self, done: int) -> None:
        """The first ``done`` batches have left all stages: let the loss scale follow them."""
        batch = None if self._scales is None else self._scales.learn(done)
        if batch is None:
            return
        loss = self.results[batch][0]
        under = f"gradients (under the smallest loss scale, {SMALLEST_SCALE:g})"
        raise self._non_finite(loss, batch, under if math.isfinite(loss) else None)
