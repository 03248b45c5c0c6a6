"""Evaluation over CUDA stages: batches are enqueued, results are read a few batches behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import batches, even_split, mlp
from nests import KINDS, nested
from plain import agrees, plain_evaluation, plain_outputs
from torch import Tensor, nn
from traps import Scene, TroubleError

from fdg_cuda import FDGRunner
from fdg_cuda.accelerator import accelerator
from fdg_cuda.cuda_inference import BATCHES_PER_STAGE


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_agrees_with_the_plain_model(stages: int) -> None:
    model, data = mlp(), batches(12)
    runner = FDGRunner(model, [0] * stages, split=even_split(8, stages))
    before = torch.get_rng_state()
    for _ in range(2):
        assert agrees(runner.evaluate(data), plain_evaluation(model, data))
        outputs = list(runner.predict_batches(data))
        expected = plain_outputs(model, data)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
        runner.fit(data, on_epoch=lambda _: runner.evaluate(data))
        before = torch.get_rng_state()


@pytest.mark.parametrize("kind", KINDS)
def test_nested_inputs_and_targets(kind: str) -> None:
    model, data, loss = nested(kind, batches(8))
    runner = FDGRunner(model, [0, 1], split=[3], loss_fn=loss)
    assert agrees(runner.evaluate(data), plain_evaluation(model, data, loss))
    expected = plain_outputs(model, data)
    for found in (runner.predict_batches(data), (runner.predict(x) for x, _ in data)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_host_waits_for_results_of_earlier_batches_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwarded = 0
    lags = []
    mark = accelerator().mark

    def marked(ordinal: int) -> Callable[[], None]:
        wait, number = mark(ordinal), forwarded

        def counted() -> None:
            lags.append(forwarded - number)
            wait()

        return counted

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal forwarded
            forwarded += 1
            return x

    monkeypatch.setattr(accelerator(), "mark", marked)
    runner = FDGRunner(nn.Sequential(Counted(), *mlp()), [0, 1, 2], split=[3, 6])
    runner.evaluate(batches(20))
    behind = 3 * BATCHES_PER_STAGE
    assert lags == [behind] * (20 - behind) + list(reversed(range(behind)))


@pytest.mark.parametrize("place", ["forward 0", "forward 2", "loss", "loader"])
def test_exceptions_of_user_code(place: str) -> None:
    scene = Scene()
    runner: Any = FDGRunner(scene.model, [0, 0, 1], split=[4, 8], loss_fn=scene.loss)
    scene.set(place, 4)
    with pytest.raises(TroubleError, match=place.split()[0]) as caught:
        runner.evaluate(scene.loader)
    if place != "loader" and hasattr(caught.value, "__notes__"):
        assert "batch 4" in caught.value.__notes__[0]
    assert all(module.training for module in scene.model.modules())
    scene.disarm()
    assert runner.evaluate(scene.loader).samples == 6 * 8 + 3
