"""The schedules of fdg_cuda.lr_schedule, step by step: rates, state, and what they refuse."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR

from fdg_cuda import lr_schedule
from fdg_cuda.lr_schedule import Rate, from_settings, warmup_cosine, warmup_milestones
from fdg_cuda.settings import Settings


def sgd(*rates: float) -> torch.optim.SGD:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, momentum=0.9)


def rates(schedule: Any, steps: int, group: int = 0) -> list[float]:
    """The learning rates of so many steps."""
    used = []
    for _ in range(steps):
        used.append(schedule.optimizer.param_groups[group]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return used


def settings(**given: Any) -> Settings:
    return Settings(**given).completed(threads=1)


# -- the curves -----------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_at_milestones() -> None:
    schedule = warmup_milestones(sgd(2.0), warmup=4, milestones=[6, 7], decay=10)
    expected = [0.2, 0.65, 1.1, 1.55, 2, 2, 0.2, 0.02, 0.02]
    assert rates(schedule, 9) == pytest.approx(expected)


def test_without_warm_up_the_rate_is_whole_from_the_first_step() -> None:
    assert rates(warmup_milestones(sgd(0.3)), 3) == [0.3, 0.3, 0.3]
    assert rates(warmup_cosine(sgd(0.3), 5), 1) == [0.3]


@pytest.mark.parametrize("min_lr", [0.0, 0.01])
def test_half_a_cosine_is_torchs(min_lr: float) -> None:
    theirs = lr_scheduler.CosineAnnealingLR(sgd(0.3), T_max=20, eta_min=min_lr)
    ours = warmup_cosine(sgd(0.3), 20, min_lr=min_lr)
    assert rates(ours, 21) == pytest.approx(rates(theirs, 21), abs=1e-12)
    assert rates(ours, 3) == [pytest.approx(min_lr)] * 3, "it stays at the end"


def test_the_cosine_begins_behind_the_warm_up() -> None:
    used = rates(warmup_cosine(sgd(1.0), 14, warmup=4, min_lr=0.2), 15)
    assert used[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    assert used[9] == pytest.approx(0.6), "half way"
    assert used[14] == pytest.approx(0.2)
    assert used[4:] == sorted(used[4:], reverse=True)


def test_a_warm_up_longer_than_the_run_and_a_rate_of_zero() -> None:
    assert rates(warmup_cosine(sgd(1.0), 2, warmup=4), 5)[:4] == pytest.approx(
        [0.1, 0.325, 0.55, 0.775]
    )
    assert rates(warmup_cosine(sgd(0.0), 2), 3) == [0, 0, 0]


def test_every_group_of_an_optimizer_ends_at_the_same_rate() -> None:
    optimizer = sgd(1.0, 0.1)
    schedule = warmup_cosine(optimizer, 4, min_lr=0.05)
    rates(schedule, 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


MAKERS: list[Callable[[torch.optim.Optimizer], LambdaLR]] = [
    lambda optimizer: warmup_milestones(optimizer, warmup=3, milestones=(5, 7)),
    lambda optimizer: warmup_cosine(optimizer, 12, warmup=3, min_lr=0.01),
]


@pytest.mark.parametrize("make", MAKERS, ids=["milestones", "cosine"])
def test_the_state_is_json_and_goes_on(make: Callable[[torch.optim.Optimizer], LambdaLR]) -> None:
    whole = rates(make(sgd(0.3)), 12)
    first = make(sgd(0.3))
    begun = rates(first, 6)
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state["lr_lambdas"]) == {None}, "what it does is made anew"
    optimizer = sgd(0.3)
    optimizer.load_state_dict(first.optimizer.state_dict())
    again = make(optimizer)
    again.load_state_dict(state)
    # Making a schedule set the rate of its first step; the state of the optimizer goes in last.
    optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + rates(again, 6) == whole


# -- from settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "batches", "expected"),
    [
        (
            {"epochs": 4, "warmup_epochs": 1, "milestones": (2, 3)},
            2,
            [0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01],
        ),
        (
            {"epochs": 4, "warmup_epochs": 1, "milestones": (2, 3), "lr_step": "epoch"},
            2,
            [0.1, 1, 0.1, 0.01],
        ),
        ({"epochs": 2, "lr_schedule": "constant", "warmup_epochs": 1}, 2, [0.1, 0.55, 1, 1]),
        (
            {"epochs": 2, "lr_schedule": "cosine", "warmup_epochs": 1, "min_lr": 0.5},
            2,
            [0.1, 0.55, 1, 0.75],
        ),
        (
            {"epochs": 4, "lr_schedule": "cosine", "warmup_epochs": 0, "lr_step": "epoch"},
            99,
            [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
        (
            {"epochs": 4, "lr_schedule": "StepLR", "lr_schedule_args": {"step_size": 2}},
            99,
            [1, 1, 0.1, 0.1],
        ),
        (
            {"epochs": 1, "lr_schedule": "LinearLR", "lr_step": "batch",
             "lr_schedule_args": {"start_factor": 0.5, "total_iters": 2}},
            3,
            [0.5, 0.75, 1],
        ),
    ],
)  # fmt: skip
def test_a_schedule_of_settings(given: dict[str, Any], batches: int, expected: list[float]) -> None:
    schedule = from_settings(sgd(1.0), settings(**given, lr=1.0), batches)
    assert rates(schedule, len(expected)) == pytest.approx(expected)


# What each class of torch needs to be made; whatever a later torch adds is to be looked at here.
NEEDED: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 1},
    "MultiStepLR": {"milestones": [1, 2]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 3},
    "ReduceLROnPlateau": {},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 3},
    "PolynomialLR": {},
}


@pytest.mark.parametrize("name", lr_schedule.names()[3:])
def test_every_class_of_torch_can_be_named(name: str) -> None:
    given = settings(lr_schedule=name, lr_schedule_args=NEEDED[name], epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = from_settings(sgd(0.1), given, 5)
    assert type(schedule) is getattr(lr_scheduler, name)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("steplr", {}, "'steplr'. Did you mean 'StepLR'"),
        ("cosin", {}, "Did you mean 'cosine'.*Known ones: milestones, cosine, constant, StepLR"),
        ("Optimizer", {}, "Unknown learning-rate schedule"),
        ("LambdaLR", {}, "wants Python objects"),
        ("StepLR", {}, "StepLR needs 'step_size'; it takes step_size, gamma"),
        ("StepLR", {"step_siz": 3}, "StepLR has no 'step_siz'; .*Did you mean 'step_size'"),
        ("StepLR", {"step_size": "3"}, "StepLR with .* does not last"),
        ("StepLR", {"step_size": 0}, "StepLR with .* does not last"),
        ("ExponentialLR", {"gamma": -1}, "lr must be a finite number, 0 or more"),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 2}, "over this run of 3 steps"),
        ("ReduceLROnPlateau", {"mode": "best"}, "best"),
    ],
)
def test_schedules_and_arguments_that_cannot_be(
    name: str, arguments: dict[str, Any], words: str
) -> None:
    given = settings(lr_schedule=name, lr_schedule_args=arguments, epochs=3)
    with pytest.raises(ValueError, match=words):
        from_settings(sgd(0.1), given, 5)


# -- the rate that was trained with ---------------------------------------------------------------


def test_the_latest_rate_is_that_of_the_batch_before_the_step() -> None:
    optimizer = sgd(1.0)
    rate = Rate(lr_scheduler.ExponentialLR(optimizer, 0.5), optimizer)
    optimizer.step()
    assert rate.latest == 1.0
    rate.step()
    rate.tested(3.0)
    assert (rate.latest, optimizer.param_groups[0]["lr"]) == (1.0, 0.5)


def test_a_plateau_moves_with_the_test_loss_only() -> None:
    optimizer = sgd(1.0)
    rate = Rate(lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), optimizer)
    for loss, latest, then in ((1.0, 1.0, 1.0), (2.0, 1.0, 0.1), (0.5, 0.1, 0.1)):
        optimizer.step()
        rate.step()
        rate.tested(loss)
        assert (rate.latest, optimizer.param_groups[0]["lr"]) == pytest.approx((latest, then))
