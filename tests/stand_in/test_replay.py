"""``backward_weights="replay"`` on CUDA devices: eager where a stage has a delay."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, batches, mlp, same_bits
from torch import nn

from fdg_cuda import FDGRunner
from fdg_cuda.accelerator import accelerator


def test_graphs_for_all_stages_are_refused() -> None:
    for method in ("fdg", "ddg"):
        with pytest.raises(ValueError, match=r"graphs=True.*backward_weights='replay'.*'current'"):
            FDGRunner(mlp(), [0, 0], method=method, backward_weights="replay", graphs=True)
    for devices, method in (([0], "fdg"), ([0, 0], "bp")):
        runner = FDGRunner(
            mlp(),
            devices,
            split=[4][: len(devices) - 1],
            method=method,
            backward_weights="replay",
            graphs=True,
        )
        runner.fit(batches(5, last=None))
        assert accelerator().captures > 0  # type: ignore[attr-defined]


def test_the_stage_without_delay_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fdg_cuda"):
        runner = FDGRunner(mlp(), [0, 1, 1], split=[3, 5], backward_weights="replay")
        runner.fit(batches(9, last=None), epochs=2)
    assert accelerator().captures == 2  # type: ignore[attr-defined]
    said = [r for r in caplog.records if "eagerly" in r.getMessage()]
    assert [r.levelno for r in said] == [logging.INFO]
    assert "stages 0 to 1 run eagerly: backward_weights='replay'" in said[0].getMessage()


@pytest.mark.parametrize("graphs", [False, "auto"])
def test_dropout_draws_the_mask_of_the_first_forward(graphs: Any) -> None:
    """At lr = 0 all gradients (the momentum sums them up) are those of ``"stash"``, to the bit."""
    torch.manual_seed(2)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 12)]
    for _ in range(4):
        layers += [nn.Dropout(0.3), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.RReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, CLASSES)).double()
    runners = []
    for mode, captured in (("stash", False), ("replay", graphs)):
        runner = FDGRunner(
            copy.deepcopy(model),
            [0, 1, 2],
            split=[6, 12],
            lr=0.0,
            backward_weights=mode,
            graphs=captured,
        )
        torch.manual_seed(5)
        runner.fit(batches(12))
        runners.append(runner)
    stash, replay = runners
    assert same_bits(stash.state_dict(), replay.state_dict())
    for one, other in zip(stash.stages, replay.stages, strict=True):
        assert one.memory.momentum.abs().sum() > 0
        assert torch.equal(one.memory.momentum, other.memory.momentum)
