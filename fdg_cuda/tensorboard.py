"""A callback that shows a training run in TensorBoard."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdg_cuda.callbacks import Callback, FitStart
from fdg_cuda.checks import whole
from fdg_cuda.metrics import BatchResult, EpochResult, History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("fdg_cuda")


class TensorBoard(Callback):
    """Writes what ``tensorboard --logdir FOLDER`` shows: ``fit(callbacks=[TensorBoard(folder)])``.

    Every ``every`` batches ``batch/loss`` and ``batch/lr`` (``batch/lr_0``, ``batch/lr_1``, ... with
    several parameter groups); after each epoch ``train/loss``, ``train/accuracy``, ``time/seconds``
    (of training), ``time/samples_per_second``, ``time/data_wait`` and, where they are measured,
    ``busy/stage_0``, ``busy/stage_1``, ... (shares in [0, 1]), and with ``precision="float16"``
    ``scale/loss_scale`` and ``scale/skipped_0``, ... (updates). The step is the number of batches
    trained since training began, over all epochs and, with checkpoints, all parts of a run: what a
    run wrote behind the checkpoint it goes on from is not shown any more. Nor is what an earlier run
    wrote into ``folder`` once another begins anew there.

    Args:
        folder: made if it is not there.
        every: batches from one point of the batches' curves to the next.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError, ValueError: an argument that cannot work.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 50) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder must be a folder's name; got {folder!r}")
        self._folder = Path(folder)
        self._every = whole("every", every, 1, "batches")
        self._make_writer = _summary_writer()
        self._writer: SummaryWriter | None = None
        self._began = False
        self._step = 0

    def log(self, name: str, value: float, step: int | None = None) -> None:
        """A point of the curve ``name`` (such as ``"test/accuracy"``) at ``step``, by default the
        present one.

        In a callback of yours during ``fit``, or after a ``fit``.

        Raises:
            RuntimeError: before any ``fit``, which may go on from a checkpoint at any step.
        """
        if not self._began:
            raise RuntimeError(
                f"log({name!r}) was called before fit, when it is not known at which step training "
                f"begins; call it in a callback's on_fit_start, behind TensorBoard in the list"
            )
        with self._open() as writer:
            writer.add_scalar(name, value, self._step if step is None else step)

    @contextmanager
    def _open(self) -> Iterator[SummaryWriter]:
        """The writer of the running ``fit``, or one for the block."""
        if self._writer is not None:
            yield self._writer
            return
        with self._make_writer(self._folder) as writer:
            yield writer

    # -- moments --------------------------------------------------------------------------------

    def on_fit_start(self, start: FitStart) -> None:
        # What is at the present step was written before the checkpoint, or by an earlier fit.
        first = self._step + 1 if self._step else 0
        self._writer = self._make_writer(self._folder, purge_step=first)
        self._began = True

    def on_batch_end(self, result: BatchResult) -> None:
        self._step += 1
        if self._step % self._every == 0:
            self.log("batch/loss", result.loss)
            rates = result.learning_rates
            for number, rate in enumerate(rates):
                self.log("batch/lr" if len(rates) == 1 else f"batch/lr_{number}", rate)

    def on_epoch_end(self, result: EpochResult) -> None:
        self.log("train/loss", result.loss)
        if result.accuracy is not None:
            self.log("train/accuracy", result.accuracy)
        self.log("time/seconds", result.seconds)
        self.log("time/samples_per_second", result.samples / result.seconds)
        self.log("time/data_wait", result.data_wait)
        for stage, share in enumerate(result.busy or ()):
            self.log(f"busy/stage_{stage}", share)
        if result.loss_scale is not None:
            self.log("scale/loss_scale", result.loss_scale)
        for stage, count in enumerate(result.skipped or ()):
            self.log(f"scale/skipped_{stage}", count)
        self._flush()

    def on_checkpoint(self, path: Path) -> None:
        self._flush()

    def on_fit_end(self, history: History) -> None:
        self._close()

    def on_exception(self, error: BaseException) -> None:
        try:
            self._close()
        except Exception as trouble:  # the error that ends training matters more
            logger.warning("the curves in %s are incomplete: %s", self._folder, trouble)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _summary_writer() -> type[SummaryWriter]:
    """Imported only here, since it takes a second."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise ImportError(
            f"fdg_cuda.TensorBoard writes with the package tensorboard, which cannot be imported "
            f"({missing}): pip install tensorboard"
        ) from missing
    return SummaryWriter
