"""A stage's input belongs to others too: layers that change theirs in place get a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fdg_cuda.nested import Nested, distinct, map_distinct, repacked


class InputGuard:
    """Of stage ``index``. The first batch, which is copied, tells whether later ones have to be.

    Attributes:
        overlapping: which tensors of the input lie in one another's memory where they come from, by
            number. Written by the stage below, with its first batch.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.overlapping: frozenset[int] = frozenset()
        self.forget()

    def forget(self) -> None:
        """A new ``fit`` begins, in which the layers may be others."""
        self._changes: bool | None = None

    @contextmanager
    def lent(self, leaf: Nested, batch: int) -> Iterator[Nested]:
        """``leaf``, the input of ``batch`` of the epoch, for the layers; in new containers.

        Raises:
            RuntimeError: they changed what must not be changed, or would change one of two tensors
                that are the same memory, and not the other.
        """
        unchanged = self._changes is False
        value = repacked(leaf) if unchanged else map_distinct(torch.clone, leaf)
        probes = [(tensor, tensor._version) for tensor in distinct(value)]
        yield value
        changed = {n for n, (probe, version) in enumerate(probes) if probe._version != version}
        if unchanged and changed:
            raise RuntimeError(
                f"stage {self._index} changed its input in place at batch {batch} but not at the first "
                f"batch; make its first layer work out of place (inplace=False)"
            )
        if changed & self.overlapping:
            raise RuntimeError(
                f"stage {self._index} changes a tensor in place that shares its memory with another "
                f"one from stage {self._index - 1}, where the change would have to be seen too. Work "
                f"out of place (inplace=False), or pass on tensors that share no memory "
                f"(tensor.clone())."
            )
        if self._changes is None:
            self._changes = bool(changed)
