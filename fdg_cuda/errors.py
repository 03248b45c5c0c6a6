"""Exceptions of this package that are not plain ValueErrors or TypeErrors."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import dataloader

from fdg_cuda.backward_weights import BackwardWeights


class NonFiniteLossError(ArithmeticError):
    """The loss of a batch (or a weight behind the epoch's last one) became NaN or infinite, and
    training stopped.

    Attributes:
        epoch: 0-based epoch of this ``fit`` the batch belongs to.
        batch: 0-based number of the batch within that epoch.
        loss: the loss.
        back_to: batch of that epoch before which the pipeline was last drained; the model holds the
            weights of then. 0 unless checkpoints are written every so many batches.
    """

    def __init__(
        self,
        loss: float,
        batch: int,
        epoch: int,
        weights: str | None = None,
        *,
        back_to: int = 0,
    ) -> None:
        self.loss = loss
        self.batch = batch
        self.epoch = epoch
        self.back_to = back_to
        since = f"it had before batch {back_to}" if back_to else "the epoch began with"
        what = f"the {weights}" if weights else "the loss"
        value = "no finite number" if weights else str(loss)
        advice = (
            "A smaller lr, more warm-up, a smaller beta or fewer stages keep delayed gradients stable. "
            "Or there are NaN or infinite values in a batch."
        )
        if epoch == batch == 0 and not weights:
            advice = (
                "No update of this fit had a part in it: look for NaN and infinite values in the "
                "batch's input and target, and in the weights that the model had."
            )
        super().__init__(
            f"{what} became {value} at batch {batch} of epoch {epoch}; training stopped and the "
            f"model holds the weights {since}. {advice}"
        )


@contextmanager
def said_where(where: str) -> Iterator[None]:
    """An exception of the user's code goes on as it is, with a note (Python 3.11) of ``where``."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"(in {where})")
        raise


class TrainingStopped(KeyboardInterrupt):
    """A signal asked training to stop, and it did at a point from which it can go on.

    Attributes:
        signal: ``"SIGINT"`` or ``"SIGTERM"``.
        epoch, batch: 0-based, where training goes on.
        checkpoint: the newest that was written; None if none could be.
        what: the message, but for how to go on.
    """

    def __init__(self, signal: str, epoch: int, batch: int, checkpoint: Path | None) -> None:
        self.signal = signal
        self.epoch = epoch
        self.batch = batch
        self.checkpoint = checkpoint
        kept = f"{checkpoint} is the checkpoint" if checkpoint else "no checkpoint was written"
        self.what = f"{signal}: stopped before batch {batch} of epoch {epoch}; {kept}"
        how = ""
        if checkpoint:
            how = (
                f". To go on, give fit what it was given and checkpoints="
                f"Checkpoints({str(checkpoint.parent)!r}, resume=True), with the same every= if there "
                f"was one"
            )
        super().__init__(self.what + how)


class LoaderWorkerError(RuntimeError):
    """A worker process of a torch ``DataLoader`` died, and training stopped.

    Attributes:
        epoch, batch: 0-based, of the batch that was to be read next.
    """

    def __init__(self, epoch: int, batch: int, cause: BaseException) -> None:
        self.epoch = epoch
        self.batch = batch
        said = (str(cause) or type(cause).__name__).strip().rstrip(".")
        super().__init__(
            f"a worker process of the loader died; batch {batch} of epoch {epoch} was to be read next "
            f"(torch said: {said}). What kills workers is mostly the lack of memory: fewer of them "
            f"(num_workers) or smaller batches need less, and without any (num_workers=0) an error of "
            f"the data set's own shows. fit can be called again, and goes on from the newest "
            f"checkpoint if it is given checkpoints with resume=True."
        )


def is_death_of_worker(error: BaseException) -> bool:
    """Whether ``error`` means that a worker of a torch ``DataLoader`` ended before its time."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited"))
    # A worker that dies while it hands a batch over breaks the connection, and torch may look at it
    # before it is quite dead. What a data set raised does not come this way.
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, (OSError, EOFError)) and any(
        code.co_name == "_try_get_data" and code.co_filename == dataloader.__file__
        for code in frames
    )


@contextmanager
def said_death_of_worker(next_batch: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """The death of a worker is said with what to do. ``next_batch``: epoch and batch.

    It is known to surface anywhere in the main thread: torch raises it in the handler of a signal.
    """
    try:
        yield
    except Exception as error:
        if not is_death_of_worker(error):
            raise
        raise LoaderWorkerError(*next_batch(), error) from error


class AliasedParameterError(RuntimeError):
    """A layer reaches a parameter in a way the runner cannot replace with a slot's own copy."""


class DeviceOutOfMemoryError(torch.OutOfMemoryError):
    """A stage does not fit on its device.

    Attributes:
        stage: which.
        device: the device's ordinal.
    """

    def __init__(self, stage: int, device: int, cause: BaseException) -> None:
        self.stage = stage
        self.device = device
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(cause))
        how_much = f" (it wanted {wanted[1]} more)" if wanted else ""
        super().__init__(
            f"stage {stage} does not fit on CUDA device {device}{how_much}. More stages (devices=[...] "
            f"with more entries), backward_weights='replay' or 'current', or a smaller batch need less "
            f"memory. "
            f"torch said: {cause}"
        )


@contextmanager
def said_out_of_memory(stage: int, device: int) -> Iterator[None]:
    """Lack of memory on ``device`` is said with what would help."""
    try:
        yield
    except DeviceOutOfMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemoryError(stage, device, error) from error
    except RuntimeError as error:
        if "cudaErrorMemoryAllocation" not in str(error):
            raise
        raise DeviceOutOfMemoryError(stage, device, error) from error


class CutMemoryError(ValueError):
    """No cut fits into the devices' memories.

    Attributes:
        stages: those that lack memory in the cut that lacks least; several share a device.
        shortage_bytes: how much they lack.
        fitting_modes: values of ``backward_weights`` with which there is a cut that fits.
    """

    def __init__(
        self,
        message: str,
        *,
        stages: range,
        shortage_bytes: int,
        fitting_modes: Sequence[BackwardWeights],
    ) -> None:
        self.stages = stages
        self.shortage_bytes = shortage_bytes
        self.fitting_modes = list(fitting_modes)
        super().__init__(message)


class CaptureError(RuntimeError):
    """A stage cannot be captured as a CUDA graph."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be gone on from, or a folder cannot take one. The message names the path."""


class UnfinishedRunError(CheckpointError):
    """A folder holds the checkpoints of an unfinished run, which was not to be gone on with.

    Attributes:
        found: what there is, in words; what to do is said in other words on the command line.
    """

    def __init__(self, newest: Path) -> None:
        self.found = (
            f"{newest.parent} holds the checkpoints of an unfinished run ({newest.name} is the "
            f"newest)"
        )
        super().__init__(
            f"{self.found}. Go on with it (resume=True), delete them (overwrite=True), or choose "
            f"another folder"
        )


class ModelCaptureError(RuntimeError):
    """A model's forward cannot be laid out as a chain, or not be cut as asked; or a batch does not fit
    what was laid out."""
