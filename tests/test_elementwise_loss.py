"""Targets that torch's element-wise losses would broadcast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner

LOSSES = [F.mse_loss, F.l1_loss, nn.SmoothL1Loss(), nn.HuberLoss()]


def batch(*shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4), torch.randn(shape))]


def runner_with(loss_fn: Any) -> FDGRunner:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    return FDGRunner(model, ["cpu", "cpu"], loss_fn=loss_fn)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_another_shape_than_the_output_s_is_refused(loss_fn: Any) -> None:
    runner = runner_with(loss_fn)
    expected = (
        r"output has shape \(8, 1\), the target \(8,\); \w+ compares .*target.reshape\(\(8, 1\)\)"
    )
    with pytest.raises(ValueError, match=expected):
        runner.fit(batch(8))
    with pytest.raises(ValueError, match=expected):
        runner.evaluate(batch(8))
    assert runner.fit(batch(8, 1)).batch_losses


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_batch_of_one_is_the_same_either_way() -> None:
    runner = runner_with(F.l1_loss)
    one = torch.randn(1, 4)
    loss = runner.evaluate([(one, torch.ones(1))]).loss
    assert loss == runner.evaluate([(one, torch.ones(1, 1))]).loss


def test_numbers_are_torch_s() -> None:
    torch.manual_seed(1)
    runner = runner_with(F.mse_loss)
    (data,) = batch(8, 1)
    expected = F.mse_loss(runner.predict(data[0]), data[1])
    assert runner.evaluate([data]).loss == pytest.approx(float(expected))


def test_one_of_the_user_s_own_may_broadcast() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), target)

    assert runner_with(loss).fit(batch(8)).batch_losses
