"""One call of ``fit``: its epochs in segments, and what happens between them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

from fdg_cuda.batches import Batch, Batches
from fdg_cuda.callbacks import Callback, FitStart
from fdg_cuda.checkpoints import Saver
from fdg_cuda.epoch import RunningEpoch
from fdg_cuda.errors import (
    TrainingStopped,
    is_death_of_worker,
    said_death_of_worker,
    said_where,
)
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.metrics import EpochResult, History
from fdg_cuda.optim import DelayedOptimizer, steps_left
from fdg_cuda.pipeline import Pipeline
from fdg_cuda.shares import Shares, Spent
from fdg_cuda.training_state import TrainingState

logger = logging.getLogger("fdg_cuda")

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
        before_epoch: called before an epoch is trained, behind all callbacks; may refuse.
        lr_scheduler: stepped after every batch that entered, or every epoch, as ``lr_step`` says.
        state: of this fit, where it is kept.
        saver: writes checkpoints; with one, signals stop the fit at a drained point.
    """

    def __init__(
        self,
        make_pipeline: MakePipeline,
        batches: Batches,
        epochs: int,
        *,
        optimizer: DelayedOptimizer,
        history: History,
        callbacks: Sequence[Callback],
        before_epoch: Callable[[], object] = lambda: None,
        lr_scheduler: Any = None,
        lr_step: str = "epoch",
        state: TrainingState | None = None,
        saver: Saver | None = None,
    ) -> None:
        self._make_pipeline = make_pipeline
        self._batches = batches
        self._epochs = epochs
        self._optimizer = optimizer
        self._history = history
        self._callbacks = callbacks
        self._before_epoch = before_epoch
        self._lr_scheduler = lr_scheduler
        self._step_batch = lr_scheduler.step if lr_scheduler and lr_step == "batch" else None
        self._step_epoch = lr_scheduler.step if lr_scheduler and lr_step == "epoch" else None
        self._state = state
        self._saver = saver
        self._epoch = RunningEpoch(0)
        # Batches between two drains; None: whole epochs.
        self._segment_batches = None if saver is None else saver.every
        self._epoch_ended = False
        self._number = 0  # of the batch to be read next, within the epoch
        self._stop = False
        self._interrupts = Interrupts(graceful=saver is not None)
        # The pipeline at work, and since when.
        self._segment: tuple[Pipeline, float] | None = None
        # Of the batches that have entered and are not reported yet.
        self._learning_rates: deque[tuple[float, ...]] = deque()

    def stop(self) -> None:
        """Let no more batches enter; what is under way is finished. Any thread may call it."""
        self._stop = True

    @property
    def running(self) -> bool:
        """Whether it is not drained."""
        return self._segment is not None

    def shares(self) -> Shares | None:
        """Of the epoch under way so far; None before it has begun. Any thread may ask."""
        spent, segment = self._epoch.spent, self._segment
        return (spent if segment is None else spent + _spent(*segment)).shares()

    def run(self) -> None:
        """Train.

        Raises:
            TrainingStopped: by a signal, while checkpoints are written.
            LoaderWorkerError: a process that makes batches died.
            Exception: whatever anything in it raised.
        """
        try:
            with (
                said_death_of_worker(lambda: (self._epoch.number, self._number)),
                self._interrupts as interrupts,
                closing(self._batches),
                self._make_pipeline(interrupts) as pipeline,
            ):
                if self._saver is not None:
                    self._epoch = self._saver.go_on() or self._epoch
                self._tell("on_fit_start", self._start())
                self._warn_of_a_short_schedule()
                if self._state is not None:
                    self._state.check()
                while self._epoch.number < self._epochs and not self._stopping():
                    self._train_epoch(pipeline)
                if interrupts.stop_signal is not None and self._epoch.number < self._epochs:
                    raise self._stopped(interrupts.stop_signal)
                self._tell("on_fit_end", self._history)
        except BaseException as error:
            for callback in self._callbacks:
                callback.on_exception(error)
            raise

    def _start(self) -> FitStart:
        return FitStart(self._epochs, self._epoch.number, self._epoch.batches)

    def _warn_of_a_short_schedule(self) -> None:
        """The scheduler's error may else be a matter of hours. Not an error yet: the fit may be stopped
        before, and a loader may be wrong about its length."""
        left = steps_left(self._lr_scheduler)
        if left is None:
            return
        steps = self._epochs - self._epoch.number
        if self._step_batch is not None:
            steps = steps * (self._batches.per_epoch or 0) - self._epoch.batches
        if steps > left:
            logger.warning(
                "lr_scheduler, a OneCycleLR, has %d steps left and raises an error behind them, but "
                "this fit will step it %d times unless it is stopped; a new one takes total_steps=%d",
                left, steps, steps,
            )  # fmt: skip

    def _stopping(self) -> bool:
        if self._interrupts.stop_signal is not None and not self._stop:
            logger.warning(
                "%s: what is under way is finished and a checkpoint written; once more stops at once",
                self._interrupts.stop_signal,
            )
            self._stop = True
        return self._stop

    def _stopped(self, signal: str) -> TrainingStopped:
        newest = None if self._saver is None else self._saver.newest
        return TrainingStopped(signal, self._epoch.number, self._epoch.batches, newest)

    def _train_epoch(self, pipeline: Pipeline) -> None:
        epoch = self._epoch
        if self._state is not None:
            self._state.before_epoch()
        self._tell("on_epoch_start", epoch.number)
        self._before_epoch()
        began = time.perf_counter()
        batches = self._begin_reading(epoch)
        waited = time.perf_counter() - began
        epoch.spent += Spent(waited, waited)
        if self._stopping():
            self._save(epoch)
            return
        if self._state is not None:
            self._state.after_passing_over()
        self._epoch_ended = False
        while True:
            self._train_segment(pipeline, batches)
            if self._epoch_ended:
                break
            self._save(epoch)
            if self._stopping():
                return
        result = epoch.result()
        self._history.epochs.append(result)
        if self._step_epoch is not None:
            self._step_epoch()
        self._epoch, self._number = RunningEpoch(epoch.number + 1), 0
        if self._state is not None:
            self._state.after_epoch()
        self._tell("on_epoch_end", result)
        self._save(self._epoch, result)

    def _begin_reading(self, epoch: RunningEpoch) -> Iterator[Batch]:
        self._number = epoch.batches
        try:
            with self._where_it_reads(), self._interrupts.allowed():
                return self._batches.epoch(epoch.batches, self._stopping)
        except Exception as error:
            if not self._stopped_with_us(error):
                raise
            return iter(())

    def _where_it_reads(self) -> AbstractContextManager[None]:
        return said_where(f"the loader, at batch {self._number} of epoch {self._epoch.number}")

    def _stopped_with_us(self, error: Exception) -> bool:
        """Whether a worker of the loader is gone because training is to stop: a signal that goes to
        all processes of a terminal or a service reaches it too."""
        return is_death_of_worker(error) and self._stopping()

    def _train_segment(self, pipeline: Pipeline, batches: Iterator[Batch]) -> None:
        epoch = self._epoch
        first, reported = epoch.batches, 0

        def report(known: int) -> None:
            nonlocal reported
            while reported < known:
                loss, samples, correct = pipeline.results[reported]
                reported += 1
                if self._saver is not None:
                    self._saver.replace_old()
                self._history.batch_losses.append(loss)
                rates = self._learning_rates.popleft()
                result = epoch.add(loss, samples, correct, rates)
                for callback in self._callbacks:
                    callback.on_batch_end(result)

        def entered() -> None:
            groups = self._optimizer.param_groups
            self._learning_rates.append(tuple(float(group["lr"]) for group in groups))
            self._optimizer.step()
            if self._step_batch is not None:
                self._step_batch()

        self._learning_rates.clear()
        self._segment = segment = (pipeline, time.perf_counter())
        try:
            pipeline.run_segment(
                epoch.number, first, self._feed(batches, first), entered=entered, known=report
            )
            epoch.spent += _spent(*segment)
            epoch.add_updates(pipeline.updates, pipeline.skipped, pipeline.loss_scale)
        finally:
            self._segment = None

    def _feed(self, batches: Iterator[Batch], first: int) -> Iterator[Batch]:
        """The batches of one segment."""
        every = self._segment_batches
        last = None if every is None else (first // every + 1) * every
        self._number = first
        while self._number != last and not self._stopping():
            try:
                with self._where_it_reads():
                    batch = next(batches, None)
            except Exception as error:
                if not self._stopped_with_us(error):
                    raise
                return
            if batch is None:
                self._epoch_ended = True
                return
            self._number += 1
            yield batch

    def _tell(self, moment: str, *arguments: object) -> None:
        with self._interrupts.allowed():
            for callback in self._callbacks:
                getattr(callback, moment)(*arguments)

    def _save(self, epoch: RunningEpoch, result: EpochResult | None = None) -> None:
        if self._saver is None or self._state is None:
            return
        path = self._saver.save(epoch, result)
        if path is not None:
            with self._state.unmoved():
                self._tell("on_checkpoint", path)


def _spent(pipeline: Pipeline, began: float) -> Spent:
    """In the segment that ``pipeline`` trains since ``began``."""
    busy = pipeline.busy_seconds()  # before the clock is read, so that no share is above 1
    return Spent(time.perf_counter() - began, pipeline.data_seconds, busy)
