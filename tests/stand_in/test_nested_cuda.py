"""Nested inputs and targets on the stand-in: packed into one buffer, eagerly and as graphs."""

from __future__ import annotations

from typing import Any

import pytest
from chains import batches, compare, even_split, mlp, same_bits
from nests import KINDS, nested, taking_apart
from torch.nn import functional as F

from fdg_cuda import FDGRunner
from fdg_cuda.accelerator import accelerator

TOLERANCE = 1e-10


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_oracle(kind: str, graphs: bool, stages: int) -> None:
    model, data, loss = nested(kind, batches(7))
    difference = compare(
        model,
        even_split(9, stages),
        data,
        device=0,
        runner_options={"graphs": graphs},
        epochs=2,
        lr=0.05,
        loss_fn=loss,
    )
    assert difference < TOLERANCE
    captured: Any = accelerator()
    assert (captured.captures > 0) == graphs


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_loss_that_takes_its_target_apart(graphs: bool) -> None:
    """Before a capture it gets the same target several times."""
    data = [(x, {"labels": y}) for x, y in batches(7)]
    found = []
    for loader, loss in (
        (batches(7), None),
        (data, lambda output, target: F.cross_entropy(output, taking_apart(target))),
    ):
        runner = FDGRunner(mlp(), [0, 0], split=[4], lr=0.05, loss_fn=loss, graphs=graphs)
        history = runner.fit(loader, epochs=2)
        samples = [epoch.samples for epoch in history.epochs]
        found.append((history.batch_losses, samples, runner.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert same_bits(found[0][2], found[1][2])


def test_another_plain_value_is_another_form() -> None:
    """A graph has baked it in: such a batch runs eagerly."""
    model, data, loss = nested("dict", batches(6, last=None))
    data[3][0]["scale"] = 0.25
    model[0].take = lambda batch: batch["x"] * batch["mask"] * batch["scale"]  # type: ignore[assignment]
    difference = compare(
        model,
        even_split(9, 2),
        data,
        device=0,
        runner_options={"graphs": True},
        lr=0.05,
        loss_fn=loss,
    )
    assert difference < TOLERANCE


def test_the_timing_changes_no_bit() -> None:
    found = []
    for delays in ((0, 0), (1, 300), (2, 300)):
        model, data, loss = nested("deep", batches(7))
        runner = FDGRunner(model, [0, 1, 1], split=[3, 6], loss_fn=loss, graphs=True)
        runner._machine.injected_delays = delays  # type: ignore[attr-defined]
        losses = runner.fit(data, epochs=2).batch_losses
        found.append((losses, runner.evaluate(data), runner.state_dict()))
    for losses, evaluation, state in found[1:]:
        assert (losses, evaluation) == found[0][:2]
        assert same_bits(state, found[0][2])
