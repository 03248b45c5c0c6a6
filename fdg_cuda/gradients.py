"""What is done with a stage's gradients between its backward and its update, where Python has a part.

Gradients are never changed in place: what autograd returns may be an activation or an error signal
that somebody else still reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdg_cuda.factory import Factory, check_factory
from fdg_cuda.flat import FlatMemory
from fdg_cuda.hyper import HyperTable
from fdg_cuda.loss_scale import all_finite

# As in torch.nn.utils.clip_grad_norm_.
SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class UpdateRule:
    """How a stage comes from gradients to an update.

    Args:
        accumulate: batches per update, which gets the mean of their gradients.
        clip_norm: the largest norm of a stage's gradients, all taken together, as they enter the
            update (shrunk); larger ones are scaled down to it. None: they are not.
        clip_value: the largest magnitude of an element of them. None: there is none.
        optimizer: makes the torch optimizer of each stage. None: SGD, as the fused update does it.
        scaled: whether losses are scaled: gradients are divided by their batch's scale, and an update
            whose gradients are not finite is left out.

    Raises:
        TypeError, ValueError: a value that cannot be, or both ways to clip.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    optimizer: Factory | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        check_factory(self.optimizer)
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int):
            raise TypeError(
                f"accumulate must be a whole number of batches per update; got {self.accumulate!r}"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1; got {self.accumulate}")
        for name in ("clip_norm", "clip_value"):
            _check_limit(name, getattr(self, name))
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value exclude each other; give one of them")

    @property
    def needs_python(self) -> str | None:
        """What needs the gradients in Python before the update; None: nothing does."""
        if self.clip_norm is not None or self.clip_value is not None:
            name = "clip_value" if self.clip_norm is None else "clip_norm"
            return f"{name} looks at the gradients between backward and update"
        if self.optimizer is not None:
            return "the optimizer given works in Python"
        if self.scaled:
            return (
                "precision='float16' looks whether gradients are finite between backward and update "
                "(bfloat16 need not)"
            )
        if self.accumulate > 1:
            return "accumulate adds gradients up in Python"
        return None


def _check_limit(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None; got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}")


@dataclass
class Ready:
    """Gradients that an update can use.

    Attributes:
        gradients: one per parameter, unshrunk; None: the loss did not reach it.
        shrinks: the factor of each, from its parameter group.
        gain: the factor of all. Where it is no finite number the update is left out.
    """

    gradients: list[Tensor | None]
    shrinks: list[float]
    gain: float | Tensor

    @property
    def skipped(self) -> bool:
        """Whether the update is left out, as far as the host knows."""
        return isinstance(self.gain, float) and math.isnan(self.gain)


class Gradients:
    """The gradients of one stage during one ``fit``.

    Args:
        memory: where the backward leaves them.
        rule: what is done with them.
        hyper: the shrinking factor and the scale of each batch.
        groups: the parameter group of each parameter.
    """

    def __init__(
        self, memory: FlatMemory, rule: UpdateRule, hyper: HyperTable, groups: Sequence[int]
    ) -> None:
        self._memory = memory
        self._rule = rule
        self.hyper = hyper
        self._groups = list(groups)
        # The sum of the batches since the last update, and which parameters have a part in it.
        self._sums: list[Tensor] = []
        if rule.accumulate > 1:
            self._sums = memory.views(torch.zeros_like(memory.newest_weights))
        self.forget()
        # Read by the native update when it runs.
        self.gain = torch.ones((), dtype=torch.float64, device=memory.newest_weights.device)
        # A number that is brought to a device would be waited for.
        self._one, self._nan = torch.ones_like(self.gain), torch.full_like(self.gain, math.nan)
        self._latest_finite: bool | Tensor = True  # those of the latest backward

    def forget(self) -> None:
        """Begin a new sum."""
        self._summed = 0
        self._finite: bool | Tensor = True  # of all batches in the sum
        self._reached = [False] * len(self._groups)

    def add(self, batch: int, signals: Sequence[Tensor | None]) -> None:
        """Those of the backward of ``batch`` are there; add them up if an update takes those of
        several. The backward came from ``signals``, error signals or the loss; a None is nothing."""
        scales = self.hyper.scales
        if scales is not None:
            self._look(batch, signals)
        if self._rule.accumulate == 1:
            return
        gradients = self._memory.take_gradients()
        there = [number for number, gradient in enumerate(gradients) if gradient is not None]
        begun = [number for number in there if self._reached[number]]
        first = [number for number in there if not self._reached[number]]
        for numbers, combine in ((first, torch._foreach_copy_), (begun, torch._foreach_add_)):
            if numbers:
                sums = [self._sums[number] for number in numbers]
                new = [g for g in map(gradients.__getitem__, numbers) if g is not None]
                if scales is not None:  # each batch has a scale of its own
                    new = list(torch._foreach_mul(new, 1 / scales.of(batch)))
                combine(sums, new)
        for number in first:
            self._reached[number] = True
        self._summed += 1

    def _look(self, batch: int, signals: Sequence[Tensor | None]) -> None:
        """Whether the latest gradients are finite.

        The signals count, too: a layer may swallow an infinity, as a ReLU does with what it does not
        pass on.
        """
        scales = self.hyper.scales
        assert scales is not None
        seen = [each for each in (*self._memory.gradients, *signals) if each is not None]
        finite: bool | Tensor = True
        if any(tensor.numel() for tensor in seen):
            finite = all_finite(seen)
            finite = finite if scales.asynchronous else bool(finite)
        scales.report(batch, self._memory.stage, finite)
        self._latest_finite = finite
        self._finite = finite if self._rule.accumulate == 1 else self._finite & finite

    def passed_down(self, error: Tensor) -> Tensor:
        """``error``, the error signal that came of the latest backward; where that was not finite no
        stage below takes anything for a number."""
        if self._latest_finite is True:
            return error
        if self._latest_finite is False:
            return torch.full_like(error, math.nan)
        return error * torch.where(self._latest_finite, self._one, self._nan)

    def prepare(self, batch: int) -> Ready:
        """What the update of ``batch`` takes. Asks no device for anything."""
        gradients, share, finite = self._memory.gradients, 1.0, self._finite
        if self._rule.accumulate > 1:
            gradients = [s if r else None for s, r in zip(self._sums, self._reached, strict=True)]
            share = 1 / self._summed
            self.forget()
        elif self.hyper.scales is not None:
            share = 1 / self.hyper.scales.of(batch)
        by_group = self.hyper.shrinks(batch, self._memory.stage)
        ready = Ready(gradients, [by_group[group] for group in self._groups], share)
        if finite is False:
            ready.gain = math.nan
            return ready
        if any(gradient is not None for gradient in gradients):
            if self._rule.clip_norm is not None:
                ready.gain = ready.gain * self._norm_factor(ready, self._rule.clip_norm)
            elif self._rule.clip_value is not None:
                self._clamp(ready, self._rule.clip_value)
        if isinstance(finite, Tensor):  # behind the norm, which hides what is no number
            ready.gain = torch.where(finite, self._one, self._nan) * ready.gain
        return ready

    def place(self, ready: Ready, row: int) -> None:
        """Put what the native update reads where it reads it."""
        self._memory.place_gradients(ready.gradients, row)
        if isinstance(ready.gain, Tensor):
            self.gain.copy_(ready.gain)
        else:
            self.gain.fill_(ready.gain)

    @staticmethod
    def _norm_factor(ready: Ready, limit: float) -> Tensor:
        """``min(1, limit / norm)``, in the dtype of the gradients."""
        present, factors = _present(ready)
        norms = torch._foreach_norm(present)
        if any(factor != 1 for factor in factors):
            norms = torch._foreach_mul(norms, factors)
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        factor = torch.clamp(limit / (norm + SMALLEST_NORM), max=1.0)
        # Without a norm nothing is clipped, and the weights show what happened; a factor that is no
        # number would skip the update.
        return torch.nan_to_num(factor, nan=1.0)

    @staticmethod
    def _clamp(ready: Ready, limit: float) -> None:
        # The update multiplies by the shrinking factor, so the limit is divided by it.
        present, factors = _present(ready)
        limits = [limit / factor if factor > 0 else math.inf for factor in factors]
        clamped = torch._foreach_clamp_max(present, limits)
        torch._foreach_clamp_min_(clamped, [-each for each in limits])
        new = iter(clamped)
        ready.gradients = [None if old is None else next(new) for old in ready.gradients]


def _present(ready: Ready) -> tuple[list[Tensor], list[float]]:
    """The gradients there are, each with the factor the update will give it, but for a norm's."""
    assert isinstance(ready.gain, float)
    pairs = [
        (gradient, shrink * ready.gain)
        for gradient, shrink in zip(ready.gradients, ready.shrinks, strict=True)
        if gradient is not None
    ]
    return [gradient for gradient, _ in pairs], [factor for _, factor in pairs]
