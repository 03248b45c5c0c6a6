"""How far a training run is: a live bar on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from fdg_cuda.callbacks import FitStart
from fdg_cuda.metrics import Average, BatchResult
from fdg_cuda.report import EpochRow, percent
from fdg_cuda.shares import Shares

if TYPE_CHECKING:
    from rich.progress import Progress

FILE_WIDTH = 200  # columns when the output goes to a file or a pipe, where nothing should wrap


def make_console() -> Console:
    """A console on stdout."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, markup=False, width=FILE_WIDTH)


class PlainProgress:
    """One line per finished epoch.

    Args:
        console: where to write.
        epochs: how many there will be.
        batches: per epoch.
    """

    def __init__(self, console: Console, epochs: int, batches: int) -> None:
        self._console = console
        self._epochs = epochs
        self._batches = batches
        self._first = FitStart(epochs)
        self._begin = time.perf_counter()

    def __enter__(self) -> PlainProgress:
        self._begin = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def start(self, start: FitStart) -> None:
        """Training begins, perhaps where another run left off."""
        self._first = start
        self._begin = time.perf_counter()

    def batch(self, result: BatchResult) -> None:
        """A batch was trained."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch was trained and tested."""
        trained = row.epoch - self._first.epoch - self._first.batch / self._batches
        left = (time.perf_counter() - self._begin) / trained * (self._epochs - row.epoch)
        speed = f"{row.samples_per_second:,.0f} samples/s"
        self._console.print(f"{self._line(row)}  {speed}  {row.shares}  {_clock(left)} left")

    def _line(self, row: EpochRow) -> str:
        width = len(str(self._epochs))
        return (
            f"epoch {row.epoch:{width}}/{self._epochs}  lr {row.lr:<6.3g}  "
            f"train loss {row.train_loss:.4f} {percent(row.train_accuracy):>7}  "
            f"test loss {row.test_loss:.4f} {percent(row.test_accuracy):>7}{row.scaling}"
        )


class LiveProgress(PlainProgress):
    """A line per finished epoch, and under them a bar with the epoch at work.

    Args:
        shares: asked after every batch where the epoch's time went so far.
    """

    def __init__(
        self,
        console: Console,
        epochs: int,
        batches: int,
        shares: Callable[[], Shares | None] = lambda: None,
    ) -> None:
        super().__init__(console, epochs, batches)
        self._shares = shares
        self._average = Average()
        self._epoch_begin = time.perf_counter()
        self._bar = _bar(console)
        self._task = self._bar.add_task("", total=epochs * batches, status=self._status(1))

    def __enter__(self) -> LiveProgress:
        super().__enter__()
        self._bar.start()
        self._epoch_begin = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, start: FitStart) -> None:
        super().start(start)
        done = start.epoch * self._batches + start.batch
        self._bar.update(self._task, completed=done, status=self._status(start.epoch + 1))

    def batch(self, result: BatchResult) -> None:
        if math.isfinite(result.loss):  # with a scaled loss training goes on without the batch
            self._average.add(result.loss, result.samples, result.correct)
        self._bar.update(self._task, advance=1, status=self._status(result.epoch + 1))

    def epoch(self, row: EpochRow) -> None:
        self._bar.console.print(self._line(row))
        self._average = Average()
        self._epoch_begin = time.perf_counter()

    def _status(self, epoch: int) -> str:
        status = f"epoch {epoch}/{self._epochs}"
        if self._average.samples:
            sofar = self._average.result()
            speed = sofar.samples / (time.perf_counter() - self._epoch_begin)
            status += (
                f"  loss {sofar.loss:.4f}  acc {percent(sofar.accuracy)}  {speed:,.0f} samples/s"
            )
            shares = self._shares()
            if shares is not None:
                status += f"\n{shares}"  # in a line of its own: 80 columns are few
        return status


def make_progress(
    console: Console,
    epochs: int,
    batches: int,
    shares: Callable[[], Shares | None] = lambda: None,
) -> PlainProgress:
    """The progress that suits ``console``."""
    if console.is_terminal:
        return LiveProgress(console, epochs, batches, shares)
    return PlainProgress(console, epochs, batches)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.fields[status]}", markup=False),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        refresh_per_second=4,  # the stages need the cores
        transient=True,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
