"""Reading a loader: what it must give, and what to say when it gives something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, Tensor]
Loader = Iterable[Any]


def check_batch(item: Any, number: int) -> Batch:
    """``item`` as (input, target).

    Raises:
        TypeError: it is no pair of tensors.
        ValueError: input and target have different lengths, or none at all.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"a {type(item).__name__}"
        if isinstance(item, (tuple, list)):
            got += f" of {len(item)}"
        raise TypeError(f"batch {number}: the loader must yield pairs (input, target); got {got}")
    x, y = item
    for name, value in (("input", x), ("target", y)):
        if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
            raise TypeError(
                f"batch {number}: the {name} is a {type(value).__name__} of {len(value)} parts, but a "
                f"chain takes one tensor and the loss another; torch.stack or torch.cat them, and "
                f"take them apart in the first layer or in loss_fn"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"batch {number}: the {name} must be a tensor; got a {type(value).__name__}. "
                f"torch.as_tensor converts numpy arrays and lists."
            )
        if value.ndim == 0 or len(value) == 0:
            raise ValueError(
                f"batch {number}: the {name} holds no samples (shape {tuple(value.shape)})"
            )
    if len(x) != len(y):
        raise ValueError(
            f"batch {number}: the input holds {len(x)} samples but the target {len(y)}; the first "
            f"dimension of both must be the batch"
        )
    return x, y


class Batches:
    """A loader read once per epoch, with a look at its first batch that consumes nothing.

    ``before_reading`` is called each time before the loader is asked for an iterator.

    Raises (on reading):
        TypeError: the loader cannot be iterated, or only once although more epochs are wanted.
        ValueError: an epoch without batches.
    """

    def __init__(
        self, loader: Loader, epochs: int = 1, before_reading: Callable[[], object] = lambda: None
    ) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"the loader must be iterable and yield pairs (input, target); got a "
                f"{type(loader).__name__}"
            )
        self._loader = loader
        self._epochs = epochs
        self._before_reading = before_reading
        self._epoch = 0
        self._begun: Iterator[Any] | None = None

    def first(self) -> Batch:
        """The first batch of the coming epoch, which will still yield it."""
        iterator = self._begin()
        try:
            item = next(iterator)
        except StopIteration:
            raise ValueError(
                f"the loader yields no batch in epoch {self._epoch}; with drop_last=True a data set "
                f"smaller than one batch gives none, and an iterator gives its batches only once"
            ) from None
        self._begun = chain([item], iterator)
        return check_batch(item, 0)

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch, without the first ``skip`` of them.

        Raises:
            ValueError: the loader has less than ``skip``.
        """
        if skip == 0:
            self.first()
        iterator, self._begun = self._begin(), None
        self._epoch += 1
        for number in range(skip):
            if next(iterator, None) is None:
                raise ValueError(
                    f"the loader yields {number} batches, but {skip} of the epoch were trained when "
                    f"the checkpoint was written; give the loader of that run"
                )
        return (check_batch(item, number) for number, item in enumerate(iterator, skip))

    def _begin(self) -> Iterator[Any]:
        if self._begun is None:
            self._before_reading()
            self._begun = iter(self._loader)
            if self._begun is self._loader and self._epochs > 1:
                raise TypeError(
                    f"the loader is a one-shot iterator (a {type(self._loader).__name__}) but "
                    f"{self._epochs} epochs are wanted; give something that can be iterated again, "
                    f"such as a list or a torch DataLoader"
                )
        return self._begun
