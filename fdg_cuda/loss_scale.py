"""Dynamic loss scaling, for gradients in float16 that arrive late.

float16 holds nothing below 6e-8 and nothing above 65504, so a backward starts from the loss times a
scale, as large as gradients allow, and the update divides by it (Micikevicius et al., "Mixed Precision
Training", ICLR 2018). Where torch's ``GradScaler`` decides on one number between a batch's backward and
the next forward, batches here are in flight: each carries the scale its loss was multiplied by, and the
scale for new ones follows what became of earlier ones a fixed number of batches later.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-10
PATIENCE = 2000  # finite batches before it grows; this and the factors are torch's


class LossScale:
    """What the losses of batches that enter now are multiplied by: a power of two, so that scaling
    rounds nothing.

    It doubles after ``patience`` finite batches under it. A batch that overflowed under the scale s
    brings it down to s / 2, unless it is there already: the batches that were in flight with the
    first that overflowed overflow for the same reason.
    """

    def __init__(self, first: float = FIRST_SCALE, patience: int = PATIENCE) -> None:
        self.value = first
        self._patience = patience
        self._finite = 0  # batches under the present value since it changed or one overflowed

    def add(self, scale: float, *, finite: bool) -> None:
        """A batch whose loss was multiplied by ``scale`` came to its end. In order of the batches."""
        if not finite:
            self.value = max(SMALLEST_SCALE, min(self.value, scale / 2))
            self._finite = 0
        elif scale == self.value:
            self._finite += 1
            if self._finite == self._patience:
                self.value *= 2
                self._finite = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact to the bit."""
        return {"value": self.value, "finite": self._finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.value, self._finite = state["value"], state["finite"]


def make_loss_scale(first: float | None, *, scaled: bool) -> LossScale | None:
    """A runner's, if its losses are ``scaled``, with its ``initial_loss_scale``.

    Raises:
        TypeError, ValueError: one that cannot be, or that would do nothing.
    """
    if first is None:
        return LossScale() if scaled else None
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        raise TypeError(f"initial_loss_scale must be a number, such as 1024; got {first!r}")
    if not scaled:
        raise ValueError(
            f"initial_loss_scale={first!r} would do nothing: only precision='float16' scales losses; "
            f"leave it out"
        )
    # 2 ** 127 is float32's largest power of two.
    if not SMALLEST_SCALE <= first <= 2.0**127 or math.frexp(first)[0] != 0.5:
        raise ValueError(
            f"initial_loss_scale must be a power of two, which rounds nothing, from 2 ** -10 to "
            f"2 ** 127, such as 1024; got {first!r}"
        )
    return LossScale(float(first))


class BatchScales:
    """The scale of each batch in flight, and at which stages its gradients were finite.

    Args:
        scale: for the batches that enter; told of all that came to their end.
        finite: bool (rows, stages) on the host: whether the batch in a row was finite there. Every
            stage writes its own column.
        accumulate: batches per update.
        asynchronous: devices write ``finite`` when they come to it, so that nobody may look before
            the batch came to its end. Else it is known when it is written.

    Attributes:
        skipped: per stage, updates that were left out in this segment.
    """

    def __init__(
        self, scale: LossScale, finite: Tensor, *, accumulate: int, asynchronous: bool
    ) -> None:
        self.asynchronous = asynchronous
        self._scale = scale
        self._finite = finite
        self._accumulate = accumulate
        self._scales = [scale.value] * len(finite)
        self.begin()

    @property
    def value(self) -> float:
        """For the next batch."""
        return self._scale.value

    def begin(self) -> None:
        """A segment begins: batches count from 0 again."""
        stages = self._finite.shape[1]
        self.skipped = [0] * stages
        self._group_skipped = [-1] * stages  # the latest update that was, by number
        self._known = 0

    def enter(self, batch: int) -> None:
        """Give ``batch`` the scale of the moment."""
        self._scales[batch % len(self._scales)] = self._scale.value

    def of(self, batch: int) -> float:
        """By what the loss of ``batch`` is multiplied."""
        return self._scales[batch % len(self._scales)]

    def report(self, batch: int, stage: int, finite: bool | Tensor) -> None:
        """Whether the gradients of ``batch`` at ``stage`` are finite; a tensor (bool, 0-dim) may be
        on its device, and is not waited for."""
        where = self._finite[batch % len(self._finite), stage]
        if isinstance(finite, Tensor):
            where.copy_(finite, non_blocking=True)
        else:
            where.fill_(finite)

    def learn(self, done: int) -> int | None:
        """The first ``done`` batches came to their end in all stages.

        Returns:
            The first that was not finite though the scale cannot be made smaller, if any.
        """
        for batch in range(self._known, done):
            self._known = batch + 1
            everywhere: list[bool] = self._finite[batch % len(self._finite)].tolist()
            update = batch // self._accumulate
            for stage, finite in enumerate(everywhere):
                if not finite and self._group_skipped[stage] != update:
                    self._group_skipped[stage] = update
                    self.skipped[stage] += 1
            self._scale.add(self.of(batch), finite=all(everywhere))
            if not all(everywhere) and self.of(batch) <= SMALLEST_SCALE:
                return batch
        return None


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all elements of all ``tensors`` (on one device) are finite, as a bool scalar there."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    # The largest magnitude is an infinity, or no number, where any element is; and read once only.
    largest = [
        norm.float()
        for alike in by_dtype.values()
        for norm in torch._foreach_norm(alike, torch.inf)
    ]
    return torch.stack(largest).isfinite().all()
