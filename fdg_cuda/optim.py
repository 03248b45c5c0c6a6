"""The optimizer face of a runner: what ``torch.optim.lr_scheduler`` drives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat

import torch
from torch import Tensor


class DelayedSGD(torch.optim.Optimizer):
    """SGD with momentum whose updates the stages make themselves, each on its own batch.

    Its one parameter group holds ``lr``, ``momentum``, ``weight_decay``, ``nesterov`` and ``beta``.
    A batch takes the values in force when it enters the pipeline, and they are those of its update
    in every stage, however much later that is.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        beta: float,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            _checked(name, value)
        _checked_beta(beta)
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True needs a momentum above 0; got momentum=0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "beta": beta,
        }
        self._complete = False
        super().__init__(params, defaults)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_complete", False):
            raise ValueError(
                "a runner's optimizer has one parameter group: the fused update uses the same "
                "hyper-parameters for every parameter of the model"
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Called by the runner once per batch entering the pipeline; changes no weight.

        ``torch.optim.lr_scheduler`` counts these calls to tell whether its order of use is right.
        """
        if closure is not None:
            raise ValueError("a runner's optimizer takes no closure; its stages run the backward")

    def hyper_row(self, shrinks: list[int]) -> list[float]:
        """``[lr, momentum, weight_decay, nesterov, beta**n for n in shrinks]`` in force now.

        Raises:
            ValueError: a value was set out of range.
        """
        group = self.param_groups[0]
        beta = _checked_beta(group["beta"])
        return [
            _checked("lr", group["lr"]),
            _checked("momentum", group["momentum"]),
            _checked("weight_decay", group["weight_decay"]),
            float(bool(group["nesterov"])),
            *(beta**n for n in shrinks),
        ]


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) or not isinstance(value, (SupportsFloat, Tensor)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    return float(value)


def _checked(name: str, value: Any) -> float:
    number = _number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or more; got {value!r}")
    return number


def _checked_beta(value: Any) -> float:
    number = _number("beta", value)
    if not 0 < number <= 1:
        raise ValueError(
            f"beta must be above 0 and at most 1 (1: gradients are not shrunk); got {value!r}"
        )
    return number


def check_scheduler(scheduler: Any, optimizer: DelayedSGD) -> None:
    """Raises:
    TypeError: it is no scheduler, or one whose step wants a metric.
    ValueError: it drives another optimizer.
    """
    if scheduler is None:
        return
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"lr_scheduler must be a torch.optim.lr_scheduler made for runner.optimizer; got a "
            f"{type(scheduler).__name__}"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau wants a metric at each step; call it yourself: "
            "fit(..., on_epoch=lambda epoch: scheduler.step(epoch.loss))"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "lr_scheduler drives another optimizer, so it would change nothing here; make it with "
            "runner.optimizer"
        )
