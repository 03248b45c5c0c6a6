"""The runner against the oracle, float64, 1e-10 relative."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chains import (
    batches,
    compare,
    convolutional,
    even_split,
    images,
    largest_difference,
    mlp,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fdg_cuda.runner
from fdg_cuda import FDGRunner
from fdg_cuda.schedule import METHODS, Schedule

TOLERANCE = 1e-10


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_runner_agrees_with_the_oracle(
    stages: int, method: str, backward_weights: str, nesterov: bool
) -> None:
    """BatchNorm, three epochs, a partial last batch."""
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(9),
        epochs=3,
        method=method,
        backward_weights=backward_weights,
        nesterov=nesterov,
        lr=0.05,
    )
    assert difference < TOLERANCE


@st.composite
def chain(draw: st.DrawFn) -> tuple[nn.Sequential, list[int]]:
    layers = draw(st.integers(4, 11))
    model = mlp(draw(st.integers(0, 999)), batch_norm=draw(st.booleans()), layers=layers)
    stages = draw(st.integers(1, 4))
    cuts = draw(
        st.lists(st.integers(1, layers - 1), min_size=stages - 1, max_size=stages - 1, unique=True)
    )
    return model, sorted(cuts)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chain=chain(),
    count=st.integers(1, 12),
    last=st.integers(2, 8),
    epochs=st.integers(1, 3),
    method=st.sampled_from(METHODS),
    backward_weights=st.sampled_from(["stash", "current", "replay"]),
    nesterov=st.booleans(),
    momentum=st.sampled_from([0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    beta=st.sampled_from([0.3, 0.5, 1.0]),
)
def test_runner_agrees_with_the_oracle_on_random_chains(
    chain: tuple[nn.Sequential, list[int]], count: int, last: int, epochs: int, **options: Any
) -> None:
    model, split = chain
    data = batches(count, last=last)
    assert compare(model, split, data, epochs=epochs, lr=0.03, **options) < TOLERANCE


def test_a_convolutional_chain_in_channels_last_agrees() -> None:
    model, data = convolutional(), images(7, channels_last=True)
    assert compare(model, [2, 3], data, epochs=2, lr=0.05) < TOLERANCE
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class OneTickLate(Schedule):
    """Every stage but the last backwards one tick later than the rule says."""

    def delay(self, stage: int) -> int:
        return super().delay(stage) + (stage < self.stages - 1)


class OneTickLateForward(Schedule):
    """Weights one update older: the forward comes before the update of its tick."""

    def backward_first(self, stage: int) -> bool:
        return False


@pytest.mark.parametrize(
    ("broken", "method"),
    [(OneTickLate, "fdg"), (OneTickLate, "ddg"), (OneTickLateForward, "fdg")],
)
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
def test_a_rule_broken_by_one_tick_disagrees(
    broken: type[Schedule],
    method: str,
    stages: int,
    backward_weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fdg_cuda.runner, "Schedule", broken)
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(12),
        method=method,
        backward_weights=backward_weights,
        lr=0.05,
    )
    assert difference > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_stage_is_torch_sgd_bit_for_bit(
    dtype: torch.dtype, nesterov: bool, method: str
) -> None:
    model = mlp().to(dtype)
    plain = copy.deepcopy(model)
    data = [(x.to(dtype), y) for x, y in batches(9)]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov}
    runner = FDGRunner(model, ["cpu"], method=method, **options)
    history = runner.fit(data, epochs=2)
    optimizer = torch.optim.SGD(plain.parameters(), **options)
    losses = []
    for x, y in data * 2:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert history.batch_losses == losses
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_list_of_modules_is_a_chain() -> None:
    model = mlp()
    layers = list(copy.deepcopy(model))
    by_list = FDGRunner(layers, ["cpu", "cpu"], split=[3], lr=0.05)
    by_list.fit(batches())
    FDGRunner(model, ["cpu", "cpu"], split=[3], lr=0.05).fit(batches())
    assert largest_difference(by_list.state_dict(), model.state_dict()) == 0
