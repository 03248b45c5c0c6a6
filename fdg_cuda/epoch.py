"""The epoch under way: its batches so far, averaged over samples. It may be trained in several
segments, between which the pipeline is drained."""

from __future__ import annotations

from typing import Any

from fdg_cuda.metrics import Average, BatchResult, EpochResult


class RunningEpoch:
    """What is known of ``number`` (0-based) so far.

    Attributes:
        batches: how many of its batches were trained and reported.
        seconds: training time so far.
        data_seconds: see :class:`~fdg_cuda.metrics.EpochResult`.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.batches = 0
        self.seconds = 0.0
        self.data_seconds = 0.0
        self._average = Average()

    def add(self, loss: float, samples: int, correct: int | None) -> BatchResult:
        """Count one more batch."""
        self._average.add(loss, samples, correct)
        self.batches += 1
        return BatchResult(self.batches - 1, self.number, loss, samples, correct)

    def result(self) -> EpochResult:
        """The averages of a finished epoch."""
        averages = self._average.result()
        return EpochResult(
            epoch=self.number,
            loss=averages.loss,
            accuracy=averages.accuracy,
            samples=averages.samples,
            batches=self.batches,
            seconds=self.seconds,
            data_seconds=self.data_seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact to the bit."""
        return {
            "batches": self.batches,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "average": self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.batches = state["batches"]
        self.seconds = state["seconds"]
        self.data_seconds = state["data_seconds"]
        self._average.load_state_dict(state["average"])
