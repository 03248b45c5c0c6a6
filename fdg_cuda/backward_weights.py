"""Which weights a batch's backward uses, and what a stage keeps of the batch until then."""

from __future__ import annotations

from enum import Enum


class BackwardWeights(Enum):
    """``slots`` below is how many batches a stage holds at once (:meth:`Schedule.slots`)."""

    STASH = "stash"
    CURRENT = "current"
    REPLAY = "replay"

    @property
    def copy_per_slot(self) -> bool:
        """Whether each batch in flight has a weight copy of its own."""
        return self is BackwardWeights.STASH

    def replays(self, slots: int) -> bool:
        """Whether the stage runs forwards again. Not where a batch's backward comes before the next
        update: there the weights of the moment are those of the forward."""
        return self is BackwardWeights.REPLAY and slots > 1
