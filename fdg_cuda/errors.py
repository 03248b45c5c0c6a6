"""Exceptions of this package that are not plain ValueErrors or TypeErrors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class NonFiniteLossError(ArithmeticError):
    """The loss of a batch (or a weight behind the epoch's last one) became NaN or infinite, and
    training stopped.

    Attributes:
        epoch: 0-based epoch of this ``fit`` the batch belongs to.
        batch: 0-based number of the batch within that epoch.
        loss: the loss.
    """

    def __init__(self, loss: float, batch: int, epoch: int, weights: str | None = None) -> None:
        self.loss = loss
        self.batch = batch
        self.epoch = epoch
        what = f"the {weights}" if weights else "the loss"
        value = "no finite number" if weights else str(loss)
        super().__init__(
            f"{what} became {value} at batch {batch} of epoch {epoch}; training stopped and the "
            f"model holds the weights the epoch began with. A smaller lr, more warm-up, a smaller "
            f"beta or fewer stages keep delayed gradients stable."
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
    """

    def __init__(self, signal: str, epoch: int, batch: int, checkpoint: Path | None) -> None:
        self.signal = signal
        self.epoch = epoch
        self.batch = batch
        self.checkpoint = checkpoint
        kept = f"{checkpoint} is the checkpoint" if checkpoint else "no checkpoint was written"
        super().__init__(f"{signal}: stopped before batch {batch} of epoch {epoch}; {kept}")


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


class CaptureError(RuntimeError):
    """A stage cannot be captured as a CUDA graph."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be gone on from, or a folder cannot take one. The message names the path."""


class ModelCaptureError(RuntimeError):
    """A model's forward cannot be laid out as a chain, or not be cut as asked; or a batch does not fit
    what was laid out."""
