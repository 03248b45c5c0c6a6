"""``capture=True``: an nn.Sequential or a list is cut inside its children, under its own names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, batches, largest_difference, same_bits
from torch import Tensor, nn

from fdg_cuda import CheckpointError, Checkpoints, FDGRunner, plan, reference
from fdg_cuda.plan_report import call

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left")

HYPER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))


def nested(seed: int = 0) -> nn.Sequential:
    """Two children, of which one is a chain and one a residual block."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 12)),
        nn.Sequential(Residual(), nn.Linear(12, CLASSES)),
    ).double()


@pytest.mark.parametrize("as_list", [False, True])
def test_bp_cut_inside_of_children_is_plain_bp(as_list: bool) -> None:
    model, plain, data = nested(), nested(), batches()
    reference.train([plain], data, method="bp", **HYPER)
    runner = FDGRunner(
        list(model) if as_list else model,
        ["cpu"] * 3,
        method="bp",
        capture=True,
        split_points=["0.2", "1.0.two"],
        **HYPER,
    )
    runner.fit(data)
    assert runner.split_points == ["0.2", "1.0.two"]
    assert same_bits(model.state_dict(), plain.state_dict())
    assert runner.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("method", ["fdg", "ddg"])
def test_delayed_gradients_are_those_of_the_same_cut_by_hand(method: str) -> None:
    model, twin, data = nested(), nested(), batches()
    parts = [
        nn.Sequential(twin[0][0], twin[0][1]),
        twin[0][2],
        twin[1],
    ]
    reference.train(parts, data, method=method, **HYPER)
    runner = FDGRunner(
        model, ["cpu"] * 3, method=method, capture=True, split_points=["0.2", "1"], **HYPER
    )
    runner.fit(data)
    assert largest_difference(model.state_dict(), twin.state_dict()) < 1e-12


def test_more_stages_than_children() -> None:
    with pytest.raises(ValueError, match=r"2 children, too few for 5 stages.*capture=True"):
        FDGRunner(nested(), ["cpu"] * 5)
    with pytest.raises(ValueError, match=r"inside of '0'.*unless capture=True"):
        FDGRunner(nested(), ["cpu"] * 2, split_points=["0.2"])
    runner = FDGRunner(nested(), ["cpu"] * 5, capture=True, sample=batches(1)[0][0])
    runner.fit(batches())
    assert runner.split is not None
    assert len(runner.split) == 4


def test_what_capture_cannot_be() -> None:
    with pytest.raises(TypeError, match="capture must be True or False; got 'inside'"):
        FDGRunner(nested(), ["cpu"], capture="inside")  # type: ignore[arg-type]


def test_a_checkpoint_of_the_one_is_refused_by_the_other(tmp_path: Path) -> None:
    for first, words in ((False, "without capture=True"), (True, "with capture=True")):
        kept = Checkpoints(tmp_path / str(first), resume=True)
        FDGRunner(nested(), ["cpu"] * 2, capture=first).fit(batches(), checkpoints=kept)
        other = FDGRunner(nested(), ["cpu"] * 2, capture=not first)
        with pytest.raises(CheckpointError, match=f"make the runner {words}, as it was"):
            other.fit(batches(), 2, checkpoints=kept)


def test_plans_count_pieces() -> None:
    x, y = batches(1, last=None)[0]
    between = plan(nested(), x, ["cpu"] * 2, target=y)
    assert between.layers == 2
    assert between.between_children
    assert not plan(
        nn.Sequential(nn.Linear(FEATURES, CLASSES)).double(), x, ["cpu"]
    ).between_children
    captured = plan(nested(), x, ["cpu"] * 3, target=y, capture=True)
    assert captured.layers > 3
    assert captured.rows[2].choice is not None
    assert "split=[3], capture=True, backward" in call(
        replace(captured.rows[1].choice, split=(3,)), capture=True
    )
    assert captured.capture
    assert not captured.between_children
