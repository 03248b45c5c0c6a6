"""Clipped gradients: the oracle's numbers, which are torch's."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from chains import FEATURES, batches, compare, even_split, largest_difference, mlp
from refusals import refused
from torch import Tensor, nn

from fdg_cuda import FDGRunner, NonFiniteLossError
from fdg_cuda.schedule import METHODS

TOLERANCE = 1e-10
# Both bite in some batches of every stage and not in all elements or batches.
CLIPS = [{"clip_norm": 0.3}, {"clip_value": 0.05}]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_agrees_with_the_oracle(
    stages: int, method: str, backward_weights: str, clip: dict[str, Any]
) -> None:
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(9),
        epochs=2,
        method=method,
        backward_weights=backward_weights,
        beta=0.7,
        lr=0.05,
        **clip,
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_the_limits_bite(clip: dict[str, Any]) -> None:
    """Else the tests above would show nothing."""
    results = []
    for options in ({}, clip):
        runner = FDGRunner(mlp(), ["cpu"] * 3, split=[2, 5], lr=0.05, **options)
        runner.fit(batches(9))
        results.append(runner.state_dict())
    for key, value in results[0].items():
        if key.endswith("weight"):
            assert not torch.allclose(value, results[1][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_one_stage_is_torch_bit_for_bit(clip: dict[str, Any], dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    plain = copy.deepcopy(model)
    data = [(x.to(dtype), y) for x, y in batches()]
    FDGRunner(model, ["cpu"], lr=0.05, **clip).fit(data, epochs=2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for x, y in data * 2:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(plain(x), y))
        if "clip_norm" in clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip["clip_norm"])
        else:
            nn.utils.clip_grad_value_(plain.parameters(), clip["clip_value"])
        optimizer.step()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


@pytest.mark.parametrize("clip", [{"clip_norm": 1e6}, {"clip_value": 1e6}], ids=str)
def test_a_limit_that_is_never_reached_changes_no_bit(clip: dict[str, Any]) -> None:
    results = []
    for options in ({}, clip):
        runner = FDGRunner(mlp(), ["cpu"] * 3, split=[2, 5], lr=0.05, **options)
        runner.fit(batches(9))
        results.append(runner.state_dict())
    assert largest_difference(*results) == 0


class Shift(nn.Module):
    """Its parameter's gradient is the very error signal that goes on to the stage below."""

    def __init__(self, samples: int, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(samples, features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("clip", [{"clip_norm": 1e-3}, {"clip_value": 1e-4}], ids=str)
def test_the_error_signal_is_not_clipped(clip: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 5), nn.Tanh(), Shift(8, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()
    data = batches(9, last=None)
    assert compare(model, [2, 3], data, lr=0.05, **clip) < TOLERANCE


def test_groups_shrink_before_they_are_clipped() -> None:
    """beta of a group decides how much its gradients count in the norm."""
    model, split = mlp(batch_norm=False), [3]
    rule = {"*.bias": {"beta": 1e-12}}
    # Biases that count for nothing, and hardly move: as if they were frozen.
    frozen = copy.deepcopy(model)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(not (name.endswith("bias") and int(name[0]) < 3))
    options: dict[str, Any] = {"split": split, "lr": 0.05, "weight_decay": 0.0, "clip_norm": 0.1}
    FDGRunner(model, ["cpu", "cpu"], param_groups=rule, **options).fit(batches(9))
    FDGRunner(frozen, ["cpu", "cpu"], **options).fit(batches(9))
    assert largest_difference(model.state_dict(), frozen.state_dict()) < 1e-8


class NoNumber(torch.autograd.Function):
    """A finite output whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Tensor:  # type: ignore[override]
        return error * math.nan


def test_gradients_that_are_no_numbers_are_not_skipped() -> None:
    """The update is not left out in silence: the weights show it, and fit says so."""
    model = mlp(batch_norm=False)
    before = copy.deepcopy(model.state_dict())
    runner = FDGRunner(
        model,
        ["cpu"],
        clip_norm=1.0,
        loss_fn=lambda output, target: nn.functional.cross_entropy(NoNumber.apply(output), target),
    )
    with pytest.raises(NonFiniteLossError):
        runner.fit(batches(1))
    assert largest_difference(model.state_dict(), before) == 0


@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_limits_out_of_range(name: str, value: float) -> None:
    with refused(ValueError, name, repr(value), "above 0"):
        FDGRunner(mlp(), ["cpu"], **{name: value})


def test_limits_that_cannot_be() -> None:
    with refused(TypeError, "clip_norm", "'1'"):
        FDGRunner(mlp(), ["cpu"], clip_norm="1")  # type: ignore[arg-type]
    with refused(ValueError, "clip_norm", "clip_value", "one of them"):
        FDGRunner(mlp(), ["cpu"], clip_norm=1.0, clip_value=1.0)
