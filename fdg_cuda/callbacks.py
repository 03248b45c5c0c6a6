"""What can be hooked into a ``fit``: one small protocol."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdg_cuda.metrics import BatchResult, EpochResult, History
from fdg_cuda.names import did_you_mean

if TYPE_CHECKING:
    from fdg_cuda.update_measures import UpdateMeasures


@dataclass(frozen=True)
class FitStart:
    """Where a ``fit`` begins.

    Attributes:
        epochs: how many there will have been at its end.
        epoch: 0-based, the first that is trained.
        batch: 0-based within that epoch, the first that is trained; above 0 only where an epoch
            goes on from a checkpoint.
    """

    epochs: int
    epoch: int = 0
    batch: int = 0


class Callback:
    """Override the moments you want; give instances to ``fit(callbacks=[...])``.

    All are called on the thread that called ``fit``, in the order of the list. Nothing runs during
    any but :meth:`on_batch_end`: there ``evaluate``, ``predict`` and ``state_dict`` may be used.
    What one raises ends the ``fit``. A subclass with a method ``on_...`` that is none of them is a
    TypeError, since it would never be called.

    Attributes:
        measures: what stages are to measure of their updates, see :class:`~fdg_cuda.StageLog`.
    """

    measures: UpdateMeasures | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        moments = [name for name in vars(Callback) if name.startswith("on_")]
        for name, value in vars(cls).items():
            if name.startswith("on_") and name not in moments and inspect.isroutine(value):
                raise TypeError(
                    f"{cls.__name__}.{name} would never be called: the moments of a callback are "
                    f"{', '.join(moments)}.{did_you_mean(name, moments)} A method of your own needs "
                    f"a name that does not begin with on_"
                )

    def on_fit_start(self, start: FitStart) -> None:
        """Before the first batch is read."""

    def on_epoch_start(self, epoch: int) -> None:
        """Before batches of ``epoch`` (0-based) are read; also of one that goes on in its middle from a
        checkpoint, with the random states it had when it began. The place for ``set_epoch``."""

    def on_batch_end(self, result: BatchResult) -> None:
        """For each batch, in order, a few ticks after its loss is known: always just as many, so
        that what is changed here (a learning rate) does not depend on timing."""

    def on_epoch_end(self, result: EpochResult) -> None:
        """Every stage has made its updates, and the model holds the finished weights."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint was written. Random numbers drawn here leave no trace in training."""

    def on_exception(self, error: BaseException) -> None:
        """Training ends by ``error`` (Ctrl-C too), which goes on to the caller of ``fit``."""

    def on_fit_end(self, history: History) -> None:
        """Training has ended as it should, or was stopped by ``runner.stop()``."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain JSON values."""
        return {}

    def check_state(self, state: dict[str, Any]) -> None:
        """What :meth:`load_state_dict` will get, before anything of the checkpoint is applied or even
        the model is cut: the place to refuse it, by raising :class:`~fdg_cuda.CheckpointError`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave when the checkpoint was written."""


class FunctionCallback(Callback):
    """The ``on_batch`` and ``on_epoch`` of ``fit``."""

    def __init__(
        self,
        on_batch: Callable[[BatchResult], object] | None,
        on_epoch: Callable[[EpochResult], object] | None,
    ) -> None:
        self._on_batch = on_batch
        self._on_epoch = on_epoch

    def on_batch_end(self, result: BatchResult) -> None:
        if self._on_batch is not None:
            self._on_batch(result)

    def on_epoch_end(self, result: EpochResult) -> None:
        if self._on_epoch is not None:
            self._on_epoch(result)


def with_state(callbacks: Sequence[Callback]) -> list[Callback]:
    """Those that a checkpoint keeps something of."""
    return [each for each in callbacks if type(each).state_dict is not Callback.state_dict]


def measures_of(callbacks: Sequence[Callback]) -> UpdateMeasures | None:
    """What ``callbacks`` want to be measured.

    Raises:
        ValueError: several do.
    """
    wanted = [callback.measures for callback in callbacks if callback.measures is not None]
    if len(wanted) > 1:
        raise ValueError(f"one fit takes one StageLog; callbacks has {len(wanted)}")
    return wanted[0] if wanted else None


def check_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """``callbacks`` as a list.

    Raises:
        TypeError: no list, or one is no :class:`Callback`.
    """
    if not isinstance(callbacks, Iterable):
        raise TypeError(
            f"callbacks must be a list of instances of subclasses of fdg_cuda.Callback; got "
            f"{_described(callbacks)}. Put even a single one into a list: callbacks=[...]"
        )
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks must be instances of subclasses of fdg_cuda.Callback; got "
                f"{_described(callback)}. Plain functions can be given as on_batch= and on_epoch="
            )
    return list(callbacks)


def _described(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return "None" if given is None else f"an instance of {type(given).__name__}"
