"""The optimizer face of a runner: what ``torch.optim.lr_scheduler`` drives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from fdg_cuda.factory import EXAMPLE, Factory, call_factory
from fdg_cuda.groups import GroupRule, ParameterGroups

FIRST_SHRINK = 4  # column of a block of the native table, as in csrc/flat_parameters.h


class DelayedOptimizer(torch.optim.Optimizer, ABC):
    """Parameter groups whose updates the stages make themselves, each on its own batch.

    A batch takes the values in force when it enters the pipeline, and they are those of its update
    in every stage, however much later that is.

    Args:
        model: all parameters of the stages.
        groups: which of them are in which group.
        param_groups, defaults: as ``torch.optim.Optimizer`` takes them, ``beta`` among the defaults.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParameterGroups,
        param_groups: list[dict[str, Any]],
        defaults: dict[str, Any],
    ) -> None:
        self._complete = False
        self.groups = groups
        self.follow(model)
        super().__init__(param_groups, defaults)
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

    @property
    def kind(self) -> str:
        """The class of the optimizer that the stages' updates are those of."""
        return "SGD"

    def follow(self, model: nn.Module) -> None:
        """Find the groups of the parameters that ``model`` has now.

        Raises:
            ValueError: a new parameter is in no group.
        """
        self._group_of = {p: self.groups.of(name, p) for name, p in model.named_parameters()}

    def groups_of(self, parameters: Iterable[nn.Parameter]) -> list[int]:
        """The number of each parameter's group."""
        return [self._group_of[parameter] for parameter in parameters]

    def names_and_groups(self, model: nn.Module) -> dict[str, int]:
        """Of each parameter of ``model`` the number of its group; but where the factory divides them
        itself, only of those that were trainable when this was made."""
        named = dict(model.named_parameters())
        if self.groups.given:
            return {name: self.groups.of(name, parameter) for name, parameter in named.items()}
        numbers = {id(p): n for n, group in enumerate(self.param_groups) for p in group["params"]}
        return {name: numbers[id(p)] for name, p in named.items() if id(p) in numbers}

    @abstractmethod
    def hyper_row(self, shrinks: Sequence[int]) -> list[list[float]]:
        """Per group ``[lr, momentum, weight_decay, nesterov, beta**n for n in shrinks]`` in force now,
        as the fused update reads them.

        Raises:
            TypeError, ValueError: a value was set that cannot be.
        """

    def values(self) -> list[dict[str, Any]]:
        """Per group what a torch optimizer's update takes, in force now; none if there is none."""
        return []


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
            "lr": _plain(lr),
            "momentum": _plain(momentum),
            "weight_decay": _plain(weight_decay),
            "nesterov": nesterov,
            "beta": beta,
        }
        _check_sgd(defaults)
        groups = ParameterGroups(param_groups, model.named_parameters())
        groups.check_keys(defaults)
        super().__init__(model, groups, groups.divide(*_trainable(model, groups)), defaults)
        for group in self.param_groups:
            _check_sgd(group)

    def hyper_row(self, shrinks: Sequence[int]) -> list[list[float]]:
        return [_sgd_block(group, shrinks) for group in self.param_groups]


class DelayedTorch(DelayedOptimizer):
    """The optimizer that ``factory`` makes, done by every stage with one of its own.

    Its parameter groups hold what that optimizer's do, and ``beta``.

    Raises:
        TypeError, ValueError: the factory makes something that stages cannot use.
    """

    def __init__(
        self,
        model: nn.Module,
        factory: Factory,
        *,
        beta: float,
        param_groups: GroupRule | None = None,
    ) -> None:
        _checked_beta(beta)
        self._factory = factory
        groups = ParameterGroups(param_groups, model.named_parameters())
        made = self._make(groups, *_trainable(model, groups), "the model")
        self._kind = type(made).__name__
        defaults = {**made.defaults, "beta": beta}
        groups.check_keys(defaults)
        super().__init__(model, groups, [dict(group) for group in made.param_groups], defaults)

    @property
    def kind(self) -> str:
        return self._kind

    def make_for(
        self, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor], stage: int
    ) -> torch.optim.Optimizer:
        """The optimizer of ``stage`` over ``tensors``, which stand for the model's ``parameters``."""
        made = self._make(self.groups, self.groups_of(parameters), tensors, f"stage {stage}")
        if len(made.param_groups) != len(self.param_groups):
            raise ValueError(
                f"the factory given as optimizer makes {len(self.param_groups)} parameter groups for "
                f"the model, but {len(made.param_groups)} for stage {stage}; divide parameters with "
                f"param_groups= instead"
            )
        return made

    def _make(
        self,
        groups: ParameterGroups,
        numbers: Sequence[int],
        tensors: Sequence[Tensor],
        whose: str,
    ) -> torch.optim.Optimizer:
        given = groups.divide(numbers, tensors) if groups.given else list(tensors)
        return call_factory(self._factory, given, whose)

    def hyper_row(self, shrinks: Sequence[int]) -> list[list[float]]:
        betas = [_checked_beta(group["beta"]) for group in self.param_groups]
        return [[0.0] * FIRST_SHRINK + [beta**n for n in shrinks] for beta in betas]

    def values(self) -> list[dict[str, Any]]:
        return [
            {name: _own(value) for name, value in group.items() if name != "params"}
            for group in self.param_groups
        ]


def make_optimizer(
    model: nn.Module,
    factory: Factory | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    beta: float,
    param_groups: GroupRule | None,
) -> DelayedOptimizer:
    """What drives the updates of ``model``; a number that is a :class:`Default` was not given.

    Raises:
        TypeError, ValueError: arguments that cannot be, or exclude each other.
    """
    if factory is None:
        return DelayedSGD(
            model,
            lr=_plain(lr),
            momentum=_plain(momentum),
            weight_decay=_plain(weight_decay),
            nesterov=nesterov,
            beta=beta,
            param_groups=param_groups,
        )
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given = [name for name, value in numbers.items() if not isinstance(value, Default)]
    given += ["nesterov"] if nesterov else []
    if given:
        raise ValueError(
            f"{' and '.join(given)} would not reach the optimizer given; set it in the factory, such "
            f"as {EXAMPLE}"
        )
    return DelayedTorch(model, factory, beta=beta, param_groups=param_groups)


class Default(float):
    """A default that can be told from the same number given."""


def _own(value: Any) -> Any:
    """``value`` as it is now: schedulers change tensors in place.

    One on a CUDA device becomes a number. Nothing orders a copy, made on the caller's stream, before
    the update on a stage's; and stages with a torch optimizer are never captured, so that a number is
    read anew for each update.
    """
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.is_cuda else value.clone()


def _plain(number: float) -> float:
    """What was given, which may be wrong in type, or the number a default stands for."""
    return float(number) if isinstance(number, Default) else number


def _trainable(model: nn.Module, groups: ParameterGroups) -> tuple[list[int], list[nn.Parameter]]:
    """The trainable parameters, and before them the numbers of their groups."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [groups.of(name, p) for name, p in named], [p for _, p in named]


def _sgd_block(group: dict[str, Any], shrinks: Sequence[int]) -> list[float]:
    beta = _checked_beta(group["beta"])
    return [
        *(checked(name, group[name]) for name in ("lr", "momentum", "weight_decay")),
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


def checked(name: str, value: Any) -> float:
    """``value`` as a number.

    Raises:
        TypeError, ValueError: it is none, negative, or not finite.
    """
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
    if isinstance(scheduler, type):
        raise TypeError(
            f"lr_scheduler must be made for runner.optimizer; got the class {scheduler.__name__}. Give "
            f"an instance: lr_scheduler={scheduler.__name__}(runner.optimizer, ...)"
        )
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"lr_scheduler must be a torch.optim.lr_scheduler made for runner.optimizer; got a "
            f"{type(scheduler).__name__}"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau wants a metric at each step; call it yourself: "
            "fit(..., on_epoch=lambda epoch: scheduler.step(epoch.loss)), or in a callback of its own, "
            "whose state_dict keeps it in checkpoints"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "lr_scheduler drives another optimizer, so it would change nothing here; make it with "
            "runner.optimizer"
        )


def steps_left(scheduler: Any) -> int | None:
    """How many more steps ``scheduler`` takes before it raises; None: any number."""
    if type(scheduler) is not torch.optim.lr_scheduler.OneCycleLR:
        return None  # the others go on for ever
    return int(scheduler.total_steps - scheduler.last_epoch)
