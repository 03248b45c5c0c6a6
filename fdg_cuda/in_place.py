"""A stage's input belongs to others too: layers, or a loss, that change it in place get a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from fdg_cuda.exact_copy import exact_copy
from fdg_cuda.hops import Pairs, wants_gradient
from fdg_cuda.nested import Nested, distinct, map_distinct, repacked


@dataclass(frozen=True)
class Lent:
    """An input as the layers, and behind them the loss, get it.

    Attributes:
        value: in containers that they may change.
        tensors: those in ``value``, whatever becomes of its containers.
        sources: of each of them the leaf that it is, or is a copy of.
    """

    value: Nested
    tensors: Sequence[Tensor]
    sources: Sequence[Tensor]
    _versions: Sequence[int]

    @classmethod
    def of(cls, leaf: Nested, value: Nested) -> Lent:
        found = distinct(value)
        return cls(value, found, distinct(leaf), [tensor._version for tensor in found])

    def changed(self) -> set[int]:
        """The numbers of those that were changed in place."""
        return {n for n, t in enumerate(self.tensors) if t._version != self._versions[n]}

    def may_depend(self, tensor: Tensor) -> bool:
        """Whether ``tensor``, which the layers computed without a graph, may depend on something
        trainable: unless it is an input that does not, as it was."""
        for number, one in enumerate(self.tensors):
            if one is tensor and one._version == self._versions[number]:
                return self.sources[number].requires_grad
        return wants_gradient(tensor)


class InputGuard:
    """Of stage ``index``. The first batch, which is copied, tells whether later ones have to be.

    Attributes:
        overlapping: which tensors of the input lie in one another's memory where they come from.
            Written by the stage below, with its first batch.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.overlapping: Pairs = frozenset()
        self.forget()

    def forget(self) -> None:
        """A new ``fit`` begins, in which the layers may be others."""
        self._changes: bool | None = None

    @contextmanager
    def lent(self, leaf: Nested, batch: int) -> Iterator[Lent]:
        """``leaf``, the input of ``batch`` of the epoch, for the layers and the loss.

        Raises:
            RuntimeError: they changed what must not be changed, or would change one of two tensors
                that are the same memory, and not the other.
        """
        unchanged = self._changes is False
        value = repacked(leaf) if unchanged else map_distinct(exact_copy, leaf)
        lent = Lent.of(leaf, value)
        yield lent
        changed = lent.changed()
        if unchanged and changed:
            raise RuntimeError(
                f"stage {self._index} changed its input in place at batch {batch} but not at the first "
                f"batch; make its layers work out of place (inplace=False), and the loss too"
            )
        if not changed.isdisjoint(chain.from_iterable(self.overlapping)):
            raise RuntimeError(
                f"stage {self._index} changes a tensor in place that shares its memory with another "
                f"one from stage {self._index - 1}, where the change would have to be seen too. Work "
                f"out of place (inplace=False), or pass on tensors that share no memory "
                f"(tensor.clone())."
            )
        if self._changes is None:
            self._changes = bool(changed)
