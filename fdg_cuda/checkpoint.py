"""A folder of checkpoints that keeps the newest and the best. ``checkpoint_file.py`` tells the format.

A file appears under its name when it is on the disk as a whole (``files.py``), and only then are
older ones removed; all that is known of a folder is in its files. So whatever stops a run at
whatever moment, the newest good checkpoint is whole and the best one is still known.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from torch import Tensor

from fdg_cuda.checkpoint_file import (
    Checkpoint,
    Summary,
    file_name,
    load_checkpoint,
    read_summary,
    step_in,
    write_checkpoint,
)
from fdg_cuda.checks import whole
from fdg_cuda.errors import CheckpointError
from fdg_cuda.files import make_durable_folder, remove_stale

logger = logging.getLogger("fdg_cuda")


class CheckpointFolder:
    """The checkpoints of one run, in one folder: the last few and the best.

    But for :meth:`clear`, only whole checkpoints of this run are ever removed. A damaged or foreign
    file of such a name is left for its owner to look at, and does not count as one of those kept.

    Args:
        folder: made by the first :meth:`save`, with its parents.
        keep: how many of the newest are kept, 1 or more; the best is kept besides.

    Raises:
        TypeError, ValueError: ``keep`` cannot work.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        self._folder = Path(folder)
        self._keep = whole("keep", keep, 1, "checkpoints")
        self._damaged: set[Path] = set()  # as far as known

    def check_writable(self) -> None:
        """Make the folder, and see that files can be made in it. A full disk is no objection: there may
        be room when the first checkpoint is written.

        Raises:
            CheckpointError: it cannot be made or written to.
        """
        try:
            make_durable_folder(self._folder)
            with TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"no checkpoints can be written into {self._folder} ({error.strerror}): name a "
                    f"folder that can be made and written to"
                ) from error

    def prepare(self, step: int) -> None:
        """Make the folder ready for a run that goes on behind ``step`` batches (0: a new run).

        :meth:`save` does so by itself; a run that calls this first is told at its beginning.

        Raises:
            CheckpointError: a good checkpoint of a later step is there: of another run, or the
                caller did not go on from the latest. Saved ones would be taken for older.
            OSError: the folder cannot be made or read.
        """
        make_durable_folder(self._folder)
        remove_stale(self._folder, "checkpoint-*.safetensors")
        for path in reversed(self._files_behind(step)):
            if path not in self._damaged:
                try:
                    self.load(path)
                except CheckpointError as error:
                    logger.warning("%s (ignored, though of a later step than %d)", error, step)
                    continue
                raise CheckpointError(
                    f"{path} is of a later step than {step}, where this run stands. Go on from it, "
                    f"or choose another folder, or remove it with all others of a later step."
                )

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        metric: float | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those that need not be kept; one of that step is replaced.

        It is on the disk when this returns. The same arguments give the same bytes.

        Args:
            step: batches trained so far in the whole run, 0 or more.
            tensors: dense ones by any text, of any device; must not be written to meanwhile.
            state: plain JSON values: dict (with text as keys), list, str, int, float (inf and nan
                included), bool, None. No tuples: they would come back as lists.
            metric: what the best is chosen by, higher is better, the earliest of equals. None and
                NaN are never the best.

        Raises:
            TypeError, ValueError: an argument that cannot be stored.
            CheckpointError: see :meth:`prepare`.
            OSError: the file cannot be written (disk full, no permission).

        In each case the checkpoints there are as they were, and nothing else is left.
        """
        path = self._folder / file_name(whole("step", step, 0, "batches"))
        self.prepare(step)
        write_checkpoint(path, step, tensors, state, metric)
        self._damaged.discard(path)
        self._remove_old()
        return path

    def latest(self) -> Checkpoint | None:
        """The newest good checkpoint; None if there is no file of such a name.

        Damaged ones are passed over with a warning.

        Raises:
            CheckpointError: there are files, and none is good.
            OSError: the folder cannot be read.
        """
        troubles, good = [], None
        for path in reversed(self.files()):
            try:
                good = self.load(path)
                break
            except CheckpointError as error:
                troubles.append(error)
        instead = f"the newest good one is {good.path.name}" if good else "none here is good"
        for trouble in troubles:
            logger.warning("%s This one is passed over: %s.", trouble, instead)
        if good or not troubles:
            return good
        raise CheckpointError(
            f"{self._folder} holds {len(troubles)} checkpoint(s), none of which is good. To begin "
            f"anew, choose another folder or remove them. The newest: {troubles[0]}"
        )

    def best(self) -> Path | None:
        """The checkpoint with the highest metric, the earliest of equals; None if none has one.

        Headers are read, contents not: :func:`load_checkpoint` may still find it damaged.
        """
        best = _best(self._good())
        return None if best is None else best.path

    def load(self, path: str | os.PathLike[str]) -> Checkpoint:
        """:func:`load_checkpoint`; what is found damaged no longer counts as one of those kept."""
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError:
            self._damaged.add(Path(path))
            raise
        self._damaged.discard(Path(path))
        return checkpoint

    def files(self) -> list[Path]:
        """What has the name of a checkpoint, good or not, in the order of their steps.

        Raises:
            OSError: the folder cannot be read.
        """
        return self._files_behind(-1)

    def clear(self) -> None:
        """Remove every file with the name of a checkpoint, damaged and foreign ones too.

        Raises:
            OSError: one cannot be removed.
        """
        for path in self.files():
            path.unlink(missing_ok=True)

    def _remove_old(self) -> None:
        good = self._good()
        best = _best(good)
        for each in good[: -self._keep]:
            if each is not best:
                try:
                    each.path.unlink(missing_ok=True)
                except OSError as error:  # what had to be written is: no reason to stop a training
                    logger.warning("%s should be removed, and cannot be: %s", each.path, error)

    def _good(self) -> list[Summary]:
        """By their headers, in the order of their steps."""
        good = []
        for path in self.files():
            if path not in self._damaged:
                try:
                    good.append(read_summary(path))
                except CheckpointError as error:
                    self._damaged.add(path)
                    logger.warning("%s (not counted)", error)
        return good

    def _files_behind(self, step: int) -> list[Path]:
        """What has the name of a checkpoint of a later step, in that order."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        steps = sorted(found for name in names if (found := step_in(name)) is not None)
        return [self._folder / file_name(each) for each in steps if each > step]


def _best(checkpoints: list[Summary]) -> Summary | None:
    measured = [
        each for each in checkpoints if each.metric is not None and not math.isnan(each.metric)
    ]
    return max(measured, key=lambda each: each.metric or 0.0, default=None)
