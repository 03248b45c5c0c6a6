"""Learning-rate schedules: warm-up with milestones, half a cosine or nothing behind it, or torch's own.

A *step* is a call of the schedule's ``step``: a batch or an epoch, as the caller has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fdg_cuda.names import check_keywords, did_you_mean
from fdg_cuda.optim import checked
from fdg_cuda.settings import OWN_SCHEDULES, Settings

WARMUP_START = 0.1  # share of the learning rate with which the first step is trained

# Those that want functions or other schedulers, which a command line cannot give.
PYTHON_ONLY = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "LRScheduler")


def warmup_milestones(
    optimizer: Optimizer, *, warmup: int = 0, milestones: Sequence[int] = (), decay: float = 10.0
) -> LambdaLR:
    """A learning rate that grows over ``warmup`` steps and is divided by ``decay`` at milestones.

    Args:
        optimizer: whose ``lr`` is the rate after the warm-up.
        warmup: steps in which it grows linearly from WARMUP_START of it; 0 for none.
        milestones: numbers of steps after which it is divided.
        decay: by what.

    Its ``state_dict`` is JSON and holds where it is, not what it does: to go on, make the same
    schedule and load the state into it.
    """

    def factor(step: int) -> float:
        passed = sum(step >= milestone for milestone in milestones)
        return _warm(step, warmup) / decay**passed

    return LambdaLR(optimizer, factor)


def warmup_cosine(
    optimizer: Optimizer, total: int, *, warmup: int = 0, min_lr: float = 0.0
) -> LambdaLR:
    """A learning rate that grows over ``warmup`` steps and falls by half a cosine to ``min_lr``.

    Args:
        optimizer: whose ``lr`` is the rate after the warm-up.
        total: steps of the whole run; behind them ``min_lr`` is reached, as in torch's
            ``CosineAnnealingLR``, and kept.
        warmup, state: see :func:`warmup_milestones`.
        min_lr: the rate at the end (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5).
    """

    def factor_of(group: dict[str, Any]) -> Callable[[int], float]:
        lr = float(group.get("initial_lr", group["lr"]))
        floor = min_lr / lr if lr else 1.0

        def factor(step: int) -> float:
            if step < warmup:
                return _warm(step, warmup)
            way = min(1.0, (step - warmup) / max(1, total - warmup))
            return floor + (1 - floor) * (1 + math.cos(math.pi * way)) / 2

        return factor

    return LambdaLR(optimizer, [factor_of(group) for group in optimizer.param_groups])


def _warm(step: int, warmup: int) -> float:
    return WARMUP_START + (1 - WARMUP_START) * step / warmup if step < warmup else 1.0


# -- by settings ----------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    """What ``--lr-schedule`` may be."""
    found = (name for name in lr_scheduler.__all__ if name not in PYTHON_ONLY)
    return (*OWN_SCHEDULES, *found)


def check_name(name: str) -> None:
    """Raises:
    ValueError: there is no such schedule, or none that settings could make.
    """
    if name in PYTHON_ONLY:
        raise ValueError(
            f"--lr-schedule {name} wants Python objects that settings cannot give; use it with "
            f"runner.fit(lr_scheduler=...), or one of {', '.join(names())}"
        )
    if name not in names():
        raise ValueError(
            f"Unknown learning-rate schedule {name!r}.{did_you_mean(name, names())} Known ones: "
            f"{', '.join(names())}."
        )


def from_settings(
    optimizer: Optimizer, settings: Settings, batches: int
) -> LRScheduler | ReduceLROnPlateau:
    """The schedule of ``settings`` (completed ones), to be stepped as ``settings.lr_step`` says.

    A class of torch is first tried out over the whole run, so that arguments which fail in its last
    epoch are refused before the first.

    Args:
        optimizer: which it will drive.
        settings: ``lr_schedule`` and what belongs to it, and ``epochs``.
        batches: per epoch.

    Raises:
        ValueError: no such schedule, or arguments it does not take.
    """
    name = settings.lr_schedule
    check_name(name)
    per_epoch = batches if settings.lr_step == "batch" else 1
    total = settings.epochs * per_epoch
    warmup = (settings.warmup_epochs or 0) * per_epoch
    if name == "cosine":
        return warmup_cosine(optimizer, total, warmup=warmup, min_lr=settings.min_lr)
    if name in OWN_SCHEDULES:
        milestones = [epoch * per_epoch for epoch in settings.milestones or ()]
        return warmup_milestones(
            optimizer, warmup=warmup, milestones=milestones, decay=settings.lr_decay
        )
    arguments = settings.lr_schedule_args or {}
    make = getattr(lr_scheduler, name)
    check_keywords("--lr-schedule-args", make, arguments, ("optimizer", "last_epoch"))
    try:
        _rehearse(make, arguments, optimizer, total)
    except Exception as error:  # whatever torch makes of the arguments
        raise ValueError(
            f"--lr-schedule {name} with {arguments} does not last over this run of {total} steps "
            f"({settings.epochs} epochs, one step per {settings.lr_step}): {error}"
        ) from error
    schedule: LRScheduler | ReduceLROnPlateau = make(optimizer, **arguments)
    return schedule


class _Rehearsed(Optimizer):
    """The groups of another optimizer, without its parameters."""

    def __init__(self, other: Optimizer) -> None:
        groups = [
            {**group, "params": [nn.Parameter(torch.zeros(()))]} for group in other.param_groups
        ]
        super().__init__(groups, dict(other.defaults))

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """So that torch does not warn of schedules that are stepped before the optimizer."""

    def check(self) -> None:
        """Raises:
        ValueError: a value that the stages would refuse.
        """
        for group in self.param_groups:
            for name in ("lr", "momentum"):
                checked(name, group.get(name, 0.0))


def _rehearse(
    make: Callable[..., Any], arguments: dict[str, Any], other: Optimizer, steps: int
) -> None:
    optimizer = _Rehearsed(other)
    schedule = make(optimizer, **arguments)
    optimizer.step()
    optimizer.check()
    if isinstance(schedule, ReduceLROnPlateau):
        schedule.step(1.0)
        return
    for _ in range(steps):
        schedule.step()
        optimizer.check()


class Rate:
    """A schedule at work in ``fit``: knows the learning rate with which the latest batch was trained.

    By the time an epoch is reported, the optimizer already has the rate of the next batch.

    Args:
        schedule: any of torch's; a ``ReduceLROnPlateau`` moves by :meth:`tested` only.
        optimizer: which it drives.

    Attributes:
        latest: the learning rate of the latest batch; before any, that of the first.
    """

    def __init__(self, schedule: LRScheduler | ReduceLROnPlateau, optimizer: Optimizer) -> None:
        self.schedule = schedule
        self.optimizer = optimizer
        self.latest = self._now()

    def step(self) -> None:
        """A batch, or an epoch, was trained."""
        self.latest = self._now()
        if not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"latest": self.latest, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.latest = state["latest"]
        self.schedule.load_state_dict(state["schedule"])

    def tested(self, loss: float) -> None:
        """An epoch's test loss is known, which some schedules follow."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(loss)

    def _now(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])
