"""Same seed, same bits: on every run and however the stages' threads interleave."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from chains import batches, even_split, mlp, same_bits
from torch import Tensor, nn

from fdg_cuda import FDGRunner, models
from fdg_cuda.schedule import METHODS


def run(
    model: nn.Sequential, stages: int, delays: tuple[int, int], **options: str
) -> tuple[dict[str, Tensor], list[float]]:
    model = copy.deepcopy(model)
    runner = FDGRunner(
        model, ["cpu"] * stages, split=even_split(len(model), stages), lr=0.05, **options
    )
    runner._machine.injected_delays = delays
    history = runner.fit(batches(14), epochs=2)
    return runner.state_dict(), history.batch_losses


@pytest.mark.parametrize(
    ("method", "backward_weights"),
    [*product(METHODS, ["stash", "current"]), ("fdg", "replay"), ("ddg", "replay")],
)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_injected_delays_change_no_bit(method: str, stages: int, backward_weights: str) -> None:
    model = mlp()
    options = {"method": method, "backward_weights": backward_weights}
    weights, losses = run(model, stages, (0, 0), **options)
    for seed in range(4):
        delayed, delayed_losses = run(model, stages, (seed, 1500), **options)
        assert same_bits(weights, delayed)
        assert losses == delayed_losses


def test_a_convolutional_net_in_float32_repeats_itself() -> None:
    data = [(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))) for _ in range(8)]
    results = []
    for repeat in range(3):
        torch.manual_seed(5)
        model = models.build("resnet20", in_channels=1, image_size=8)
        runner = FDGRunner(model, ["cpu", "cpu"], split=[5])
        runner._machine.injected_delays = (repeat, 3000 * (repeat > 0))
        runner.fit(data, epochs=2)
        results.append(runner.state_dict())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_the_measured_cut_is_remembered(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """split=None: measured once, so a second runner cuts in the same place."""
    splits = []
    for _ in range(3):
        runner = FDGRunner(mlp(layers=11), ["cpu", "cpu"])
        runner.fit(batches(3))
        splits.append(runner.split)
    assert splits[0] is not None
    assert splits[0] == splits[1] == splits[2]
