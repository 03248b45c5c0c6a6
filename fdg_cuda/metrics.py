"""Loss and accuracy of batches and epochs, averaged over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fdg_cuda.nested import Nested

LABELS = (torch.int64, torch.uint8)  # their dtypes
IGNORED_LABEL = -100  # torch's


@dataclass(frozen=True)
class BatchResult:
    """One trained batch.

    Attributes:
        batch, epoch: counted from 0; the batch within its epoch.
        loss: mean over its samples.
        samples: in the batch.
        correct: how many of them were classified right; None where the target is no class index per
            sample, or the output more than one tensor.
        learning_rates: with which its updates are made, one per parameter group.
    """

    batch: int
    epoch: int
    loss: float
    samples: int
    correct: int | None
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Averages over samples. ``accuracy`` is a share in [0, 1], or None if there are no classes."""

    loss: float
    accuracy: float | None
    samples: int


@dataclass(frozen=True)
class EpochResult:
    """One trained epoch: averages over its samples as they were trained, and how long it took.

    ``data_seconds`` is the part of ``seconds`` in which the loader was waited for and at the end of
    which no stage had anything left to do: above a few percent, the loader holds training up.
    ``busy`` has a share of ``seconds`` per stage, in [0, 1]: how long an action of it was at work,
    waiting for Python's lock included; None where it is not measured (CUDA devices).
    With ``precision="float16"``: ``skipped`` has per stage the updates that were left out because
    gradients were not finite, ``loss_scale`` is where the scale stands behind the epoch, and batches
    whose loss was not finite are left out of the averages. ``updates`` is how many each stage had to
    make, those left out included.
    """

    epoch: int
    loss: float
    accuracy: float | None
    samples: int
    batches: int
    seconds: float
    data_seconds: float = 0.0
    busy: tuple[float, ...] | None = None
    skipped: tuple[int, ...] | None = None
    loss_scale: float | None = None
    updates: int = 0

    @property
    def data_wait(self) -> float:
        """``data_seconds`` as a share of ``seconds``."""
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0


@dataclass
class History:
    """What ``fit`` returns: ``batch_losses`` in batch order over all its epochs."""

    batch_losses: list[float] = field(default_factory=list)
    epochs: list[EpochResult] = field(default_factory=list)


class Average:
    """Sample-weighted sums of batches, in the order they are added."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._correct: int | None = 0
        self.samples = 0

    def add(self, loss: float, samples: int, correct: int | None) -> None:
        self._loss += loss * samples
        self.samples += samples
        if correct is None or self._correct is None:
            self._correct = None
        else:
            self._correct += correct

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact to the bit."""
        return {"loss": self._loss, "correct": self._correct, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._loss, self._correct = state["loss"], state["correct"]
        self.samples = state["samples"]

    def result(self) -> Evaluation:
        if self.samples == 0:  # of all batches the loss was not finite
            return Evaluation(math.nan, None, 0)
        accuracy = None if self._correct is None else self._correct / self.samples
        return Evaluation(self._loss / self.samples, accuracy, self.samples)


def has_classes(output: Nested, target: Nested) -> bool:
    """Whether ``output`` (N, classes) can be compared with ``target`` (N,) of an integer dtype."""
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        return False
    if output.ndim != 2 or output.shape[1] < 2:
        return False
    if target.shape != output.shape[:1]:
        return False
    dtype = target.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def count_correct(output: Nested, target: Nested) -> int | None:
    """Samples whose largest output is at the target's index; None if there are no classes."""
    if not has_classes(output, target):
        return None
    return int((output.argmax(dim=1) == target).sum())


def correct_on_device(output: Nested, target: Nested, device: torch.device) -> Tensor:
    """:func:`count_correct` as a float64 scalar on ``device``, the output's; NaN for None."""
    if not has_classes(output, target):
        return torch.full((), torch.nan, dtype=torch.float64, device=device)
    correct: Tensor = output.argmax(dim=1) == target
    return correct.sum(dtype=torch.float64)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """``torch.nn.functional.cross_entropy``, the default loss.

    Raises:
        TypeError: output or target is not one tensor.
        ValueError: the output has one column, of which the cross entropy is always 0, or fewer than
            there are classes (on the CPU; a CUDA device stops with an assertion of its own); or the
            target has no shape or dtype that goes with the output.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        raise TypeError(
            f"the default loss is the cross entropy of one tensor and its labels; here the model's "
            f"output is a {type(output).__name__}, the target a {type(target).__name__}. Give loss_fn="
        )
    if output.ndim > 1 and output.shape[1] == 1:
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)}, one class, whose cross entropy (the "
            f"default loss) is always 0; give loss_fn=torch.nn.functional.mse_loss, "
            f"binary_cross_entropy_with_logits or what you mean"
        )
    try:
        return F.cross_entropy(output, target)
    except IndexError as error:  # a class out of bounds; not looked for before, in every batch
        if output.ndim == 0:
            raise
        classes = output.shape[min(1, output.ndim - 1)]
        labels = target[target != IGNORED_LABEL]
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)}, {classes} classes, and the labels go "
            f"from {int(labels.min())} to {int(labels.max())}; they must lie between 0 and "
            f"{classes - 1}: give the model an output per class, and number the classes from 0"
        ) from error
    except (RuntimeError, ValueError) as error:  # torch's say little of what would do instead
        whole = target.dtype in LABELS and target.shape == output.shape[:1] + output.shape[2:]
        shares = target.is_floating_point() and target.shape == output.shape
        if whole or shares:
            raise
        raise ValueError(
            f"the default loss is the cross entropy of an output (N, classes, ...) and whole labels (N, "
            f"...), or floating shares of the output's shape; got {output.dtype} {tuple(output.shape)} "
            f"and {target.dtype} {tuple(target.shape)} ({error}). Give such targets, or loss_fn="
        ) from error
