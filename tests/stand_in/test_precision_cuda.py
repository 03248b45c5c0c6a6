"""Half precision on CUDA devices: bfloat16 in graphs too, float16 with flags that stay on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import even_split, mlp, same_bits
from overflows import SPLIT, overflowing, single
from torch import nn

from fdg_cuda import EpochResult, FDGRunner
from fdg_cuda.accelerator import accelerator
from fdg_cuda.loss_scale import LossScale

FIRST = 2.0**12


def trained(make: Any, device: str | int, split: list[int], **options: Any) -> tuple[Any, ...]:
    """Weights, losses and epochs of two epochs with a partial last batch."""
    runner = FDGRunner(make(), [device] * (len(split) + 1), split=split, lr=0.05, **options)
    if options["precision"] == "float16":
        runner._loss_scale = LossScale(FIRST)
    history = runner.fit(single(14), epochs=2)
    return runner.state_dict(), history.batch_losses, history.epochs


def shown(epochs: list[EpochResult]) -> list[tuple[Any, ...]]:
    return [(e.loss, e.accuracy, e.samples, e.skipped, e.loss_scale) for e in epochs]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("stages", [1, 3])
def test_bfloat16_is_that_of_the_cpu(stages: int, backward_weights: str, graphs: bool) -> None:
    split = even_split(8, stages)
    options = {"precision": "bfloat16", "backward_weights": backward_weights}
    cpu = trained(lambda: mlp().float(), "cpu", split, **options)
    cuda = trained(lambda: mlp().float(), 0, split, graphs=graphs, **options)
    assert same_bits(cpu[0], cuda[0])
    assert cpu[1] == cuda[1]
    assert (accelerator().captures > 0) == graphs  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backward_weights": "current"},
        {"backward_weights": "replay"},
        {"method": "ddg"},
        {"clip_norm": 0.3},
        {"clip_value": 0.05},
        {"accumulate": 3},
    ],
    ids=str,
)
def test_float16_is_that_of_the_cpu(options: dict[str, Any]) -> None:
    """Overflows in the middle stage, of which one is in flight while the scale falls."""
    results = [
        trained(lambda: overflowing((0, 2, 12)), device, SPLIT, precision="float16", **options)
        for device in ("cpu", 0)
    ]
    (weights, losses, epochs), (weights_cuda, losses_cuda, epochs_cuda) = results
    assert epochs[0].skipped is not None
    assert epochs[0].skipped[0] == epochs[0].skipped[1] > epochs[0].skipped[2] == 0
    assert shown(epochs) == shown(epochs_cuda)
    assert losses == losses_cuda
    assert same_bits(weights, weights_cuda)


def test_sleeps_of_the_device_change_no_number() -> None:
    results = []
    for seed in range(3):
        runner = FDGRunner(overflowing((2, 9)), [0, 1, 2], split=SPLIT, precision="float16")
        runner._machine.injected_delays = (seed, 200 * (seed > 0))  # type: ignore[attr-defined]
        history = runner.fit(single(20))
        results.append((runner.state_dict(), shown(history.epochs)))
    for weights, epochs in results[1:]:
        assert same_bits(weights, results[0][0])
        assert epochs == results[0][1]


def test_a_loss_that_is_not_finite_does_not_end_the_run() -> None:
    data = single(8)
    data[3] = (data[3][0] * 1e6, data[3][1])
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 4))
    epoch = FDGRunner(model, [0, 1], split=[2], precision="float16").fit(data).epochs[0]
    assert (epoch.skipped, epoch.samples) == ((1, 1), 8 * 6 + 3)


def test_what_float16_cannot_be_combined_with() -> None:
    options: dict[str, Any] = {"split": SPLIT, "precision": "float16"}
    with pytest.raises(ValueError, match=r"graphs=True.*precision='float16'.*bfloat16"):
        FDGRunner(overflowing(), [0, 0, 0], graphs=True, **options)
    with pytest.raises(ValueError, match=r"torch optimizer.*precision='bfloat16'"):
        FDGRunner(overflowing(), [0, 0, 0], optimizer=torch.optim.AdamW, **options)
