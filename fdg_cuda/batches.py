"""Reading a loader: what it must give, and what to say when it gives something else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from fdg_cuda.loader_workers import end_workers_of
from fdg_cuda.nested import Nested, check_nested

Batch = tuple[Nested, Nested]
Loader = Iterable[Any]


def check_batch(item: Any, number: int) -> Batch:
    """``item`` as (input, target).

    Raises:
        TypeError: it is no pair, or input or target is no (nested) tensor.
        ValueError: input and target have different lengths, or none at all.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"a {type(item).__name__}"
        if isinstance(item, (tuple, list)):
            got += f" of {len(item)}"
        raise TypeError(f"batch {number}: the loader must yield pairs (input, target); got {got}")
    x, y = item
    samples = check_nested(x, f"batch {number}: the input")
    targets = check_nested(y, f"batch {number}: the target")
    if samples != targets:
        nested = not (isinstance(x, Tensor) and isinstance(y, Tensor))
        raise ValueError(
            f"batch {number}: the input holds {samples} samples but the target {targets}; the first "
            f"dimension of {'the first tensor in ' if nested else ''}both must be the batch"
        )
    return x, y


def only_inputs(loader: Loader) -> Iterator[Nested]:
    """The inputs a loader yields: of pairs (input, target) the first part.

    Raises:
        TypeError, ValueError: on reading, where there is no input.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor):
        raise TypeError(
            f"the loader must be iterable and yield inputs, or pairs (input, target); got a "
            f"{type(loader).__name__}. For one input there is runner.predict(x)."
        )
    for number, item in enumerate(loader):
        if isinstance(item, (tuple, list)):
            if len(item) not in (1, 2):
                raise TypeError(
                    f"batch {number}: the loader must yield inputs, or pairs (input, target); got a "
                    f"{type(item).__name__} of {len(item)}. An input that is a tuple itself goes into "
                    f"a pair: (input, None)."
                )
            item = item[0]
        check_nested(item, f"batch {number}: the input")
        yield item


class Batches:
    """A loader read once per epoch, with a look at its first batch that consumes nothing.

    ``before_reading`` is called each time before the loader is asked for an iterator. A loader may
    have ``iter_from(batch)``, which does what ``iter`` does, without the first ``batch`` batches.

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
        self._iter_from: Callable[[int], Iterator[Any]] | None = getattr(loader, "iter_from", None)
        self._epochs = epochs
        self._before_reading = before_reading
        self._epoch = 0
        self._begun: Iterator[Any] | None = None
        self._iterator: Iterator[Any] | None = None  # the loader's own, read at present

    @property
    def per_epoch(self) -> int | None:
        """How many batches the loader says an epoch has; None if it does not. Asking may leave traces
        in the loader (torch's counts on it)."""
        try:
            return len(self._loader)  # type: ignore[arg-type]
        except Exception:  # it is the user's code, and nothing depends on it
            return None

    def first(self) -> Batch:
        """The first batch of the coming epoch, which will still yield it."""
        iterator = self._begin()
        try:
            item = next(iterator)
        except StopIteration:
            again = f" in epoch {self._epoch}" if self._epoch else ""
            raise ValueError(
                f"the loader yields no batch{again}; with drop_last=True a data set "
                f"smaller than one batch gives none, and an iterator gives its batches only once"
            ) from None
        self._begun = chain([item], iterator)
        return check_batch(item, 0)

    def begin_anew(self) -> None:
        """The coming epoch's first batch was looked at too early: the loader will be asked for its
        iterator again. One that gives its batches only once goes on with the batch looked at."""
        if self._iterator is not self._loader:
            self.close()

    def epoch(self, skip: int = 0, stopping: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """The batches of the next epoch, without the first ``skip`` of them. A loader with
        ``iter_from`` need not make those. Once ``stopping`` they are passed over no further, and what
        is returned is not to be read.

        Raises:
            ValueError: the loader has less than ``skip``.
        """
        if skip == 0:
            self.first()
        to_pass_over = 0 if self._begun is None and self._iter_from is not None else skip
        iterator, self._begun = self._begin(skip), None
        self._epoch += 1
        for number in range(to_pass_over):
            if stopping():
                break
            if next(iterator, None) is None:
                raise ValueError(
                    f"the loader yields {number} batches, but {skip} of the epoch were trained when "
                    f"the checkpoint was written; give the loader of that run"
                )
        return (check_batch(item, number) for number, item in enumerate(iterator, skip))

    def close(self) -> None:
        """Nothing more will be read. The processes of a pass that a torch ``DataLoader``, or a loader
        with ``iter_from``, was asked for end now. Other iterators may be the caller's, to go on with.
        """
        iterator, self._iterator, self._begun = self._iterator, None, None
        if self._iter_from is not None and isinstance(iterator, Generator):
            iterator.close()
        elif iterator is not self._loader:
            end_workers_of(iterator)

    def _begin(self, at: int = 0) -> Iterator[Any]:
        if self._begun is None:
            self._before_reading()
            begun = iter(self._loader) if self._iter_from is None else self._iter_from(at)
            self._begun = self._iterator = begun
            if self._begun is self._loader and self._epochs > 1:
                raise TypeError(
                    f"the loader is a one-shot iterator (a {type(self._loader).__name__}) but "
                    f"{self._epochs} epochs are wanted; give something that can be iterated again, "
                    f"such as a list or a torch DataLoader"
                )
        return self._begun
