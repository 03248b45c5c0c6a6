"""A captured model on the stand-in is trained as on the CPU, eagerly and as graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chains import largest_difference
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner
from fdg_cuda.accelerator import accelerator

TOLERANCE = 1e-10


class Residual(nn.Module):
    """Skips, statistics, code that follows its mode, and a buffer that all blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((8,), 0.5))
        self.gain = 1.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + F.relu(block(x)) * (self.gain if self.training else 1.0)) * self.scale
        return self.head(x)


class Long(Residual):
    """What the stem gives is wanted at the end; two tensors cross most cuts."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        x = first
        for block in self.blocks:
            x = F.relu(block(x)) * self.scale
        return self.head(x + first)


def data_of(seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (5, 5, 5, 5, 5, 3)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_is_trained_as_on_the_cpu(graphs: bool) -> None:
    torch.manual_seed(0)
    model, data = Residual().double(), data_of()
    twin = copy.deepcopy(model)
    points = ["blocks.1", "blocks.2"]
    runner = FDGRunner(model, [0, 1, 1], split_points=points, graphs=graphs, lr=0.05)
    before = runner.evaluate(data)
    plain = FDGRunner(twin, ["cpu"] * 3, split_points=points, lr=0.05)
    assert before.loss == pytest.approx(plain.evaluate(data).loss, rel=TOLERANCE)
    for scale in (0.5, 0.25):  # which every stage reads
        for each in (runner, plain):
            state = {**each.state_dict(), "scale": torch.full((8,), scale, dtype=torch.float64)}
            each.load_state_dict(state)
            each.fit(data, epochs=2)
        assert largest_difference(runner.state_dict(), plain.state_dict()) < TOLERANCE
    assert runner.split == plain.split
    assert runner.evaluate(data).loss == pytest.approx(plain.evaluate(data).loss, rel=TOLERANCE)
    outputs = [runner.predict(data[0][0]), *runner.predict_batches(data[:1])]
    assert all(torch.allclose(plain.predict(data[0][0]), output) for output in outputs)
    captured: Any = accelerator()
    assert (captured.captures > 0) == graphs


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_measured_cuts_through_skips(graphs: bool) -> None:
    torch.manual_seed(0)
    model, data = Long().double(), data_of()
    twin = copy.deepcopy(model)
    runner = FDGRunner(model, [0, 1, 1], graphs=graphs, lr=0.05)
    losses = runner.fit(data, epochs=2).batch_losses
    plain = FDGRunner(twin, ["cpu"] * 3, split=runner.split, lr=0.05)
    assert losses == pytest.approx(plain.fit(data, epochs=2).batch_losses, rel=1e-9)
    assert largest_difference(runner.state_dict(), plain.state_dict()) < TOLERANCE
    assert torch.allclose(runner.predict(data[0][0]), plain.predict(data[0][0]))


def test_graphs_follow_the_modes_of_code_that_is_followed() -> None:
    """The model's own, which belongs to no stage's modules, but to code in all of them."""
    captured: Any = accelerator()
    found = []
    for devices in ([0, 1, 1], ["cpu"] * 3):
        torch.manual_seed(0)
        model, captures = Residual().double(), []

        def freeze(result: Any, model: nn.Module = model, captures: list[int] = captures) -> None:
            captures.append(captured.captures)
            model.training = False

        runner = FDGRunner(model, devices, split_points=["blocks.1", "blocks.2"], lr=0.05)
        losses = runner.fit(data_of(), epochs=3, on_epoch=freeze).batch_losses
        found.append((losses, runner.state_dict(), captures))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert largest_difference(found[0][1], found[1][1]) < TOLERANCE
    first, second, third = found[0][2]
    assert (second, third) == (2 * first, 2 * first)  # anew where the mode was another
