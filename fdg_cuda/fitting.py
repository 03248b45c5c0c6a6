"""One call of ``fit``: its epochs in segments, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from fdg_cuda.batches import Batch, Batches
from fdg_cuda.callbacks import Callback, FitStart
from fdg_cuda.epoch import RunningEpoch
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.metrics import History
from fdg_cuda.optim import DelayedSGD
from fdg_cuda.pipeline import Pipeline

MakePipeline = Callable[[Interrupts], AbstractContextManager[Pipeline]]


class Fit:
    """Trains until ``epochs`` epochs are finished, or :meth:`stop` is called.

    Args:
        make_pipeline: of this fit, closed when it ends.
        batches: the loader's.
        epochs: how many there will have been.
        optimizer: stepped for every batch that enters.
        history: filled.
        callbacks: told of everything.
        lr_scheduler: stepped after every batch that entered, or every epoch, as ``lr_step`` says.
    """

    def __init__(
        self,
        make_pipeline: MakePipeline,
        batches: Batches,
        epochs: int,
        *,
        optimizer: DelayedSGD,
        history: History,
        callbacks: Sequence[Callback],
        lr_scheduler: Any = None,
        lr_step: str = "epoch",
    ) -> None:
        self._make_pipeline = make_pipeline
        self._batches = batches
        self._epochs = epochs
        self._optimizer = optimizer
        self._history = history
        self._callbacks = callbacks
        self._step_batch = lr_scheduler.step if lr_scheduler and lr_step == "batch" else None
        self._step_epoch = lr_scheduler.step if lr_scheduler and lr_step == "epoch" else None
        self._epoch = RunningEpoch(0)
        self._segment_batches: int | None = None  # batches between two drains; None: whole epochs
        self._epoch_ended = False
        self._stop = False
        self.running = False  # not drained

    def stop(self) -> None:
        """Let no more batches enter; what is under way is finished. Any thread may call it."""
        self._stop = True

    def run(self) -> None:
        """Train."""
        try:
            with Interrupts() as interrupts, self._make_pipeline(interrupts) as pipeline:
                self._tell(interrupts, "on_fit_start", self._start())
                while self._epoch.number < self._epochs and not self._stop:
                    self._train_epoch(pipeline, interrupts)
                self._tell(interrupts, "on_fit_end", self._history)
        except BaseException as error:
            for callback in self._callbacks:
                callback.on_exception(error)
            raise

    def _start(self) -> FitStart:
        return FitStart(self._epochs, self._epoch.number, self._epoch.batches)

    def _train_epoch(self, pipeline: Pipeline, interrupts: Interrupts) -> None:
        epoch = self._epoch
        if epoch.batches == 0:
            self._tell(interrupts, "on_epoch_start", epoch.number)
        batches = self._batches.epoch(epoch.batches)
        self._epoch_ended = False
        while not (self._epoch_ended or self._stop):
            self._train_segment(pipeline, batches)
        if not self._epoch_ended:
            return
        result = epoch.result()
        self._history.epochs.append(result)
        if self._step_epoch is not None:
            self._step_epoch()
        self._epoch = RunningEpoch(epoch.number + 1)
        self._tell(interrupts, "on_epoch_end", result)

    def _train_segment(self, pipeline: Pipeline, batches: Iterator[Batch]) -> None:
        epoch = self._epoch
        first, reported = epoch.batches, 0

        def report(known: int) -> None:
            nonlocal reported
            while reported < known:
                loss, samples, correct = pipeline.results[reported]
                reported += 1
                self._history.batch_losses.append(loss)
                result = epoch.add(loss, samples, correct)
                for callback in self._callbacks:
                    callback.on_batch_end(result)

        def entered() -> None:
            self._optimizer.step()
            if self._step_batch is not None:
                self._step_batch()

        began = time.perf_counter()
        self.running = True
        try:
            pipeline.run_segment(
                epoch.number, first, self._feed(batches, first), entered=entered, known=report
            )
        finally:
            self.running = False
        epoch.seconds += time.perf_counter() - began
        epoch.data_seconds += pipeline.data_seconds

    def _feed(self, batches: Iterator[Batch], first: int) -> Iterator[Batch]:
        """The batches of one segment."""
        every = self._segment_batches
        last = None if every is None else (first // every + 1) * every
        number = first
        while number != last and not self._stop:
            batch = next(batches, None)
            if batch is None:
                self._epoch_ended = True
                return
            yield batch
            number += 1

    def _tell(self, interrupts: Interrupts, moment: str, *arguments: object) -> None:
        interrupts.allow()
        for callback in self._callbacks:
            getattr(callback, moment)(*arguments)
        interrupts.hold()
