"""The optimizer face of a runner: what ``torch.optim.lr_scheduler`` drives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from fdg_cuda.groups import GroupRule, ParameterGroups


class DelayedOptimizer(torch.optim.Optimizer, ABC):
    """Parameter groups whose updates the stages make themselves, each on its own batch.

    A batch takes the values in force when it enters the pipeline, and they are those of its update
    in every stage, however much later that is.

    Args:
        model: all parameters of the stages.
        rule: which of them are in which group; see :class:`~fdg_cuda.groups.ParameterGroups`.
        defaults: the hyper-parameters of the default group, ``beta`` among them.
    """

    def __init__(self, model: nn.Module, rule: GroupRule | None, defaults: dict[str, Any]) -> None:
        self._complete = False
        self._groups = ParameterGroups(rule, model.named_parameters(), defaults)
        self.follow(model)
        params: list[list[nn.Parameter]] = [[] for _ in self._groups.overrides]
        for parameter in model.parameters():
            if parameter.requires_grad:
                params[self._group_of[parameter]].append(parameter)
        groups = zip(params, self._groups.overrides, strict=True)
        super().__init__([{"params": own, **overrides} for own, overrides in groups], defaults)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._complete:
            raise ValueError(
                "a runner's parameter groups are made with it, since its stages divide them among "
                "themselves; give FDGRunner(..., param_groups=...)"
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Called by the runner once per batch entering the pipeline; changes no weight.

        ``torch.optim.lr_scheduler`` counts these calls to tell whether its order of use is right.
        """
        if closure is not None:
            raise ValueError("a runner's optimizer takes no closure; its stages run the backward")

    def follow(self, model: nn.Module) -> None:
        """Find the groups of the parameters that ``model`` has now.

        Raises:
            ValueError: a new parameter is in no group.
        """
        self._group_of = {p: self._groups.of(name, p) for name, p in model.named_parameters()}

    def groups_of(self, parameters: Iterable[nn.Parameter]) -> list[int]:
        """The number of each parameter's group."""
        return [self._group_of[parameter] for parameter in parameters]

    @abstractmethod
    def hyper_row(self, shrinks: Sequence[int]) -> list[list[float]]:
        """Per group ``[lr, momentum, weight_decay, nesterov, beta**n for n in shrinks]`` in force now,
        as the fused update reads them.

        Raises:
            TypeError, ValueError: a value was set that cannot be.
        """


class DelayedSGD(DelayedOptimizer):
    """SGD with momentum, as the fused update does it.

    Its parameter groups hold ``lr``, ``momentum``, ``weight_decay``, ``nesterov`` and ``beta``.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        beta: float,
        param_groups: GroupRule | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "beta": beta,
        }
        _check_sgd(defaults)
        super().__init__(model, param_groups, defaults)
        for group in self.param_groups:
            _check_sgd(group)

    def hyper_row(self, shrinks: Sequence[int]) -> list[list[float]]:
        return [_sgd_block(group, shrinks) for group in self.param_groups]


def _sgd_block(group: dict[str, Any], shrinks: Sequence[int]) -> list[float]:
    beta = _checked_beta(group["beta"])
    return [
        *(_checked(name, group[name]) for name in ("lr", "momentum", "weight_decay")),
        float(bool(group["nesterov"])),
        *(beta**n for n in shrinks),
    ]


def _check_sgd(group: dict[str, Any]) -> None:
    _sgd_block(group, [])
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov=True needs a momentum above 0; got momentum=0")


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


def check_scheduler(scheduler: Any, optimizer: DelayedOptimizer) -> None:
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
