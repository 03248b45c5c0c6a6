"""A loss that is not finite: which batch, and the weights to go back to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from chains import batches, mlp, same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from versions import (
    parameters,
    runner_of,
    state,
)

from fdg_cuda import Checkpoints, FDGRunner, NonFiniteLossError

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


class SpoiledLoss:
    """Becomes ``value`` at the ``at``-th call, counted from 0."""

    def __init__(self, at: int, value: float) -> None:
        self.at, self.value, self.calls = at, value, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        self.calls += 1
        return loss * self.value if self.calls - 1 == self.at else loss


@pytest.mark.parametrize("batch", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(("stages", "method"), [(1, "fdg"), (2, "fdg"), (3, "fdg"), (3, "ddg")])
def test_loss_that_is_not_finite(stages: int, method: str, epoch: int, batch: int) -> None:
    """The model goes back to the end of the last finite epoch, and so does the momentum."""
    data, value = batches(5), (math.nan, math.inf)[batch == 4]
    model, twin = mlp(), mlp()
    own = parameters(model)
    loss_fn = SpoiledLoss(5 * epoch + batch, value)
    runner = runner_of(model, stages, method=method, loss_fn=loss_fn)
    untroubled = runner_of(twin, stages, method=method)
    untroubled.fit(data, epochs=epoch)

    with pytest.raises(NonFiniteLossError, match=f"batch {batch} of epoch {epoch}") as caught:
        runner.fit(data, epochs=4)
    assert (caught.value.epoch, caught.value.batch) == (epoch, batch)
    assert not math.isfinite(caught.value.loss)
    assert ("smaller lr" in str(caught.value)) is (epoch + batch > 0)
    assert same_bits(state(model), state(twin))
    assert all(a is b for a, b in zip(parameters(model), own, strict=True))

    for each in (runner, untroubled):
        each.optimizer.param_groups[0]["lr"] = 0.01
    losses = runner.fit(data, epochs=2).batch_losses
    assert losses == untroubled.fit(data, epochs=2).batch_losses
    assert same_bits(state(model), state(twin))


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_overflow_behind_the_last_finite_loss(epochs: int) -> None:
    """The losses of this epoch are finite, the weights its last updates leave are not. The model
    must not be left with them, whether another epoch follows or not."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4)).double()
    initial = state(model)
    runner = FDGRunner(model, ["cpu"], lr=1e308)
    with pytest.raises(NonFiniteLossError):
        runner.fit([(1e4 * x, y) for x, y in batches(1, last=None)], epochs=epochs)
    assert same_bits(state(model), initial)


def test_before_anything_was_trained_it_is_not_put_down_to_the_learning_rate() -> None:
    runner = runner_of(mlp())
    good = batches(1)
    with pytest.raises(
        NonFiniteLossError, match=r"batch 0 of .* values in the batch's input"
    ) as caught:
        runner.fit([(x * math.nan, y) for x, y in good])
    assert "smaller lr" not in str(caught.value)
    with pytest.raises(NonFiniteLossError, match=r"batch 1 of .* A smaller lr") as caught:
        runner.fit([*good, *((x * math.nan, y) for x, y in good)])


def test_loss_that_is_not_finite_with_a_buffer_that_was_made_meanwhile() -> None:
    class Lazy(nn.Module):
        scale: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.ones_like(x[0])
            return x * self.scale

    model = nn.Sequential(Lazy(), *mlp())
    runner = runner_of(model, loss_fn=SpoiledLoss(1, math.nan))
    with pytest.raises(NonFiniteLossError, match="batch 1 of epoch 0"):
        runner.fit(batches(3))
    runner.fit(batches(3))


def test_with_checkpoints_within_the_epoch_it_is_the_last_drain_that_counts(tmp_path: Path) -> None:
    model, data = mlp(), batches(6)
    runner = FDGRunner(model, ["cpu"] * 2, split=[4], loss_fn=SpoiledLoss(5, math.nan))
    with pytest.raises(NonFiniteLossError, match="it had before batch 4") as caught:
        runner.fit(data, checkpoints=Checkpoints(tmp_path, every=2))
    assert (caught.value.batch, caught.value.back_to) == (5, 4)
    plain = mlp()
    other = FDGRunner(plain, ["cpu"] * 2, split=[4])
    other.fit(data[:4], checkpoints=Checkpoints(tmp_path / "other", every=2))
    assert same_bits(model.state_dict(), plain.state_dict())
