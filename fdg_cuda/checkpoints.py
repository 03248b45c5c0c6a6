"""When a ``fit`` writes checkpoints, and how it goes on from one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdg_cuda.checkpoint import CheckpointFolder
from fdg_cuda.checkpoint_file import Checkpoint
from fdg_cuda.epoch import RunningEpoch
from fdg_cuda.errors import CheckpointError, UnfinishedRunError
from fdg_cuda.metrics import EpochResult
from fdg_cuda.training_state import TrainingState

logger = logging.getLogger("fdg_cuda")


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a ``fit`` writes checkpoints: ``fit(loader, 90, checkpoints=...)``.

    One is written at the end of each epoch, and when training is stopped by SIGTERM, Ctrl-C or
    ``runner.stop()``. Going on from one written at an epoch's end or by ``every`` gives, to the bit,
    what training without a break gives.

    Attributes:
        folder: made if it is not there.
        every: also after so many batches of an epoch. The pipeline drains there, which costs
            2(K-1) ticks and is part of the arithmetic: another ``every`` gives other weights, and is
            refused where training goes on.
        keep: how many are kept, besides the best.
        resume: go on from the newest good checkpoint in ``folder``; start anew if there is none.
            Hyper-parameters are the checkpoint's; a warning names those that were given otherwise.
        overwrite: without ``resume``: delete the checkpoints of an unfinished run, which is refused
            otherwise. Those of a finished run are replaced. Either happens when the first batch of
            the new run was trained.
        metric: of a finished epoch, the higher the better, called behind the callbacks; default:
            minus its training loss.
    """

    folder: str | os.PathLike[str]
    every: int | None = None
    keep: int = 3
    resume: bool = False
    overwrite: bool = False
    metric: Callable[[EpochResult], float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value is None and name == "every":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}")
        if self.resume and self.overwrite:
            raise ValueError("resume goes on from a checkpoint and overwrite deletes it; give one")


def as_checkpoints(value: Checkpoints | str | os.PathLike[str]) -> Checkpoints:
    """A folder stands for :class:`Checkpoints` of it.

    Raises:
        TypeError: neither.
    """
    if isinstance(value, Checkpoints):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Checkpoints(value)
    raise TypeError(f"checkpoints must be a folder or fdg_cuda.Checkpoints; got {value!r}")


class Saver:
    """Writes the checkpoints of one ``fit``, and reads the one it goes on from.

    Args:
        settings: where and how often.
        state: what is written.
        epochs: how many there will have been.
    """

    def __init__(self, settings: Checkpoints, state: TrainingState, epochs: int) -> None:
        self.every = settings.every
        self.newest: Path | None = None
        self._newest_step: int | None = None
        self._to_clear = False
        self._found: Checkpoint | None = None
        self._settings = settings
        self._state = state
        self._epochs = epochs
        self._folder = CheckpointFolder(Path(settings.folder), keep=settings.keep)

    def begin(self) -> Mapping[str, Any] | None:
        """The recipe of the checkpoint that :meth:`go_on` goes on from; None: training starts anew.

        Raises:
            CheckpointError: there are checkpoints, but none can be read, or a callback refuses
                what is in the newest; or the folder cannot be made or written to.
            UnfinishedRunError: they belong to an unfinished run that is not to be gone on with.
        """
        settings = self._settings
        # Of a finished run there is nothing left to write.
        if not (settings.resume and Path(settings.folder).is_dir()):
            self._folder.check_writable()
        if settings.overwrite:
            self._to_clear = True
            return None
        found = self._folder.latest()
        if found is None:
            if settings.resume:
                logger.warning("no checkpoint in %s yet: training starts anew", settings.folder)
            return None
        if settings.resume:
            logger.info("going on from %s", found.path)
            self._found = found
            with _does_not_fit(found.path):
                self._state.check_callbacks(found.state)
            recipe: Mapping[str, Any] = found.state["recipe"]
            return recipe
        if not found.state.get("finished"):
            raise UnfinishedRunError(found.path)
        self._to_clear = True
        return None

    def naming_the_checkpoint(self) -> AbstractContextManager[None]:
        """A refusal in the block names the file that :meth:`begin` found."""
        return nullcontext() if self._found is None else _does_not_fit(self._found.path)

    def replace_old(self) -> None:
        """Delete the checkpoints that this run replaces, now that it works; later calls do nothing.

        Raises:
            OSError: one cannot be removed.
        """
        if self._to_clear:
            self._folder.clear()
            self._to_clear = False

    def go_on(self) -> RunningEpoch | None:
        """Go back to the checkpoint that was found; returns the epoch to go on with. None: there is
        nothing to go on from. Afterwards its tensors are no longer held.

        Raises:
            CheckpointError: it belongs to a run of another kind.
        """
        checkpoint, self._found = self._found, None
        if checkpoint is None:
            return None
        with _does_not_fit(checkpoint.path):
            epoch = self._state.apply(checkpoint.tensors, checkpoint.state)
        self.newest, self._newest_step = checkpoint.path, checkpoint.step
        return epoch

    def save(self, epoch: RunningEpoch, result: EpochResult | None = None) -> Path | None:
        """Write a checkpoint with ``epoch`` under way, or about to begin behind ``result``; its path.

        None is returned if there is nothing to write that the newest one does not hold. A disk that
        is full, or another OSError, does not end training either: it is said, and the next checkpoint
        is another try.

        Raises:
            TypeError: see :meth:`TrainingState.collect`.
            Exception: what the caller's ``metric`` raised.
        """
        metric = self._metric(result)
        tensors, state = self._state.collect(epoch, self._epochs)
        step = tensors["losses"].numel()
        if result is None and step == self._newest_step:
            return None
        try:
            self.replace_old()
            self.newest = self._folder.save(step, tensors, state, metric=metric)
        except OSError as error:
            logger.error(
                "the checkpoint behind batch %d of epoch %d could not be written (%s); training goes "
                "on, and the next one is another try",
                epoch.batches,
                epoch.number,
                error,
            )
            return None
        self._newest_step = step
        return self.newest

    def _metric(self, result: EpochResult | None) -> float | None:
        if result is None:
            return None
        metric = self._settings.metric
        return -result.loss if metric is None else float(metric(result))


@contextmanager
def _does_not_fit(path: Path) -> Iterator[None]:
    """A refusal names the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
