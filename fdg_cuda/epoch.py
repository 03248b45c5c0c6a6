"""The epoch under way: its batches so far, averaged over samples. It may be trained in several
segments, between which the pipeline is drained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fdg_cuda.metrics import Average, BatchResult, EpochResult
from fdg_cuda.shares import Spent


class RunningEpoch:
    """What is known of ``number`` (0-based) so far.

    Attributes:
        batches: how many of its batches were trained and reported.
        spent: training time so far.
        updates: how many each stage had to make so far, those left out included.
        skipped: per stage, updates left out so far; None where losses are not scaled.
        loss_scale: where it stands now; None likewise.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.batches = 0
        self.spent = Spent()
        self.updates = 0
        self.skipped: tuple[int, ...] | None = None
        self.loss_scale: float | None = None
        self._average = Average()

    def add(
        self, loss: float, samples: int, correct: int | None, learning_rates: tuple[float, ...]
    ) -> BatchResult:
        """Count one more batch."""
        if math.isfinite(loss):  # else its update was left out
            self._average.add(loss, samples, correct)
        self.batches += 1
        return BatchResult(self.batches - 1, self.number, loss, samples, correct, learning_rates)

    def add_updates(
        self, updates: int, skipped: Sequence[int] | None, loss_scale: float | None
    ) -> None:
        """Count the updates of a segment, and those it left out; the scale stands there behind it."""
        self.updates += updates
        self.loss_scale = loss_scale
        if skipped is not None:
            before = self.skipped or (0,) * len(skipped)
            self.skipped = tuple(a + b for a, b in zip(before, skipped, strict=True))

    def result(self) -> EpochResult:
        """The averages of a finished epoch."""
        averages, shares = self._average.result(), self.spent.shares()
        return EpochResult(
            epoch=self.number,
            loss=averages.loss,
            accuracy=averages.accuracy,
            samples=averages.samples,
            batches=self.batches,
            seconds=self.spent.seconds,
            data_seconds=self.spent.data,
            busy=None if shares is None else shares.busy,
            skipped=self.skipped,
            loss_scale=self.loss_scale,
            updates=self.updates,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact to the bit."""
        return {
            "batches": self.batches,
            "seconds": self.spent.seconds,
            "data_seconds": self.spent.data,
            "busy_seconds": None if self.spent.busy is None else list(self.spent.busy),
            "updates": self.updates,
            "skipped": None if self.skipped is None else list(self.skipped),
            "average": self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.batches = state["batches"]
        busy = state["busy_seconds"]
        self.spent = Spent(
            state["seconds"], state["data_seconds"], None if busy is None else tuple(busy)
        )
        self.updates = state["updates"]
        self.skipped = None if state["skipped"] is None else tuple(state["skipped"])
        self._average.load_state_dict(state["average"])
