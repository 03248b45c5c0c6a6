"""Several batches per update: the oracle's numbers, and what must follow from the definition."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from chains import (
    CLASSES,
    FEATURES,
    batches,
    compare,
    cut,
    even_split,
    largest_difference,
    mlp,
)
from refusals import refused
from torch import Tensor, nn

from fdg_cuda import FDGRunner, NonFiniteLossError, reference
from fdg_cuda.schedule import METHODS

# Sums over threads are rounded otherwise than sums over none, and K stages share the threads.
pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-10


def adam(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, eps=1e-6)


@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_agrees_with_the_oracle(
    stages: int, method: str, backward_weights: str, accumulate: int
) -> None:
    """Of nine batches one is left over by two, none by three."""
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(9),
        epochs=2,
        method=method,
        backward_weights=backward_weights,
        accumulate=accumulate,
        lr=0.05,
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_batches_may_be_left_over(count: int) -> None:
    for method in ("fdg", "ddg"):
        data = batches(count)
        difference = compare(mlp(), [2, 5], data, epochs=2, method=method, accumulate=4, lr=0.05)
        assert difference < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.2}, {"clip_value": 0.03}, {"optimizer": adam}],
    ids=["clip_norm", "clip_value", "adam"],
)
@pytest.mark.parametrize("stages", [1, 3])
def test_the_mean_is_what_is_clipped_and_what_an_optimizer_gets(
    stages: int, options: dict[str, Any]
) -> None:
    split = even_split(8, stages)
    rate = {} if "optimizer" in options else {"lr": 0.05}
    difference = compare(
        mlp(), split, batches(8), epochs=2, accumulate=3, beta=0.7, **rate, **options
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_one_stage_is_torchs_gradient_accumulation_bit_for_bit(accumulate: int) -> None:
    model, plain, data = mlp(), mlp(), batches(8)
    FDGRunner(model, ["cpu"], lr=0.05, accumulate=accumulate).fit(data, epochs=2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for number, (x, y) in enumerate(data * 2):
        torch.autograd.backward(nn.functional.cross_entropy(plain(x), y) / accumulate)
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_with_one_update_per_epoch_all_methods_are_one(stages: int) -> None:
    """Every gradient is that of the epoch's first weights, however late it comes."""
    results = []
    for method in METHODS:
        for backward_weights in ("stash", "current", "replay"):
            runner = FDGRunner(
                mlp(),
                ["cpu"] * stages,
                split=even_split(8, stages),
                method=method,
                backward_weights=backward_weights,
                accumulate=20,
                beta=1.0,
            )
            runner.fit(batches(9), epochs=3)
            results.append(runner.state_dict())
    for other in results[1:]:
        assert largest_difference(results[0], other) < 1e-12


def test_without_a_rate_only_the_statistics_move_as_in_bp() -> None:
    results = []
    for stages, method, accumulate in ((1, "bp", 1), (3, "fdg", 2), (4, "ddg", 3)):
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        runner = FDGRunner(
            model,
            ["cpu"] * stages,
            split=even_split(8, stages),
            method=method,
            accumulate=accumulate,
            lr=0.0,
        )
        runner.fit(batches(7))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])
        results.append(runner.state_dict())
    assert largest_difference(results[0], results[1]) == 0
    assert largest_difference(results[0], results[2]) == 0


@pytest.mark.parametrize(("count", "accumulate"), [(8, 2), (9, 2), (9, 4), (3, 5)])
def test_decay_and_momentum_act_once_per_update(count: int, accumulate: int) -> None:
    model = mlp(batch_norm=False)
    runner = FDGRunner(
        model,
        ["cpu"] * 3,
        split=[2, 5],
        weight_decay=0.5,
        momentum=0.5,
        accumulate=accumulate,
        loss_fn=lambda output, target: output.sum() * 0,
    )
    before = runner.state_dict()
    runner.fit(batches(count), epochs=2)
    updates = 2 * math.ceil(count / accumulate)
    assert [stage.memory.updates for stage in runner.stages] == [updates] * 3
    weight, velocity = 1.0, 0.0
    for _ in range(updates):
        velocity = 0.5 * velocity + 0.5 * weight
        weight -= 0.1 * velocity
    for name, value in runner.state_dict().items():
        assert torch.allclose(value, before[name] * weight, rtol=1e-12)


@pytest.mark.parametrize("stages", [1, 3])
def test_an_update_has_the_rate_of_its_last_batch(stages: int) -> None:
    model, split = mlp(), even_split(8, stages)
    parts = cut(model, split)
    rates = [0.1 / (1 + n) for n in range(30)]
    reference.train(parts, batches(), epochs=3, accumulate=3, lr=lambda n: rates[n])
    runner = FDGRunner(model, ["cpu"] * stages, split=split, accumulate=3, lr=rates[0])
    schedule = torch.optim.lr_scheduler.LambdaLR(runner.optimizer, lambda n: 1 / (1 + n))
    runner.fit(batches(), epochs=3, lr_scheduler=schedule, lr_step="batch")
    whole = nn.Sequential(*(layer for part in parts for layer in part))
    assert largest_difference(model.state_dict(), whole.state_dict()) < TOLERANCE


class Sometimes(nn.Module):
    """Two parameters, of which the first input decides which one has a part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))
        self.other = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.one if x[0, 0] > 0 else self.other)


def test_parameters_that_only_some_batches_reach() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sometimes(), nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    data = batches(12)
    for number, (x, _) in enumerate(data):
        x[0, 0] = 1.0 if number in (1, 2, 3, 7, 11) else -1.0
    assert compare(model.double(), [2], data, epochs=2, accumulate=3, lr=0.05) < TOLERANCE


def test_what_was_added_up_in_an_epoch_that_broke_off_is_forgotten() -> None:
    data = batches(9)
    spoiled = [*data[:4], (data[4][0] * math.nan, data[4][1]), *data[5:]]
    model, plain = mlp(batch_norm=False), mlp(batch_norm=False)
    runner = FDGRunner(model, ["cpu"] * 2, split=[4], accumulate=3, lr=0.05)
    other = FDGRunner(plain, ["cpu"] * 2, split=[4], accumulate=3, lr=0.05)
    runner.fit(data)
    with pytest.raises(NonFiniteLossError):
        runner.fit(spoiled)
    runner.fit(data)
    other.fit(data, epochs=2)
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


@pytest.mark.parametrize("value", [0, -2])
def test_less_than_one_batch(value: int) -> None:
    with refused(ValueError, "accumulate", str(value), "at least 1"):
        FDGRunner(mlp(), ["cpu"], accumulate=value)


@pytest.mark.parametrize("value", ["2", 2.0, True, None])
def test_no_whole_number(value: Any) -> None:
    with refused(TypeError, "accumulate", repr(value), "whole number"):
        FDGRunner(mlp(), ["cpu"], accumulate=value)
