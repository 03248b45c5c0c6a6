"""The epoch under way: its batches so far, averaged over samples. It may be trained in several
segments, between which the pipeline is drained."""

from __future__ import annotations

from typing import Any

from fdg_cuda.metrics import Average, BatchResult, EpochResult
from fdg_cuda.shares import Spent


class RunningEpoch:
    """What is known of ``number`` (0-based) so far.

    Attributes:
        batches: how many of its batches were trained and reported.
        spent: training time so far.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.batches = 0
        self.spent = Spent()
        self._average = Average()

    def add(
        self, loss: float, samples: int, correct: int | None, learning_rates: tuple[float, ...]
    ) -> BatchResult:
        """Count one more batch."""
        self._average.add(loss, samples, correct)
        self.batches += 1
        return BatchResult(self.batches - 1, self.number, loss, samples, correct, learning_rates)

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
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact to the bit."""
        return {
            "batches": self.batches,
            "seconds": self.spent.seconds,
            "data_seconds": self.spent.data,
            "busy_seconds": None if self.spent.busy is None else list(self.spent.busy),
            "average": self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.batches = state["batches"]
        busy = state["busy_seconds"]
        self.spent = Spent(
            state["seconds"], state["data_seconds"], None if busy is None else tuple(busy)
        )
        self._average.load_state_dict(state["average"])
