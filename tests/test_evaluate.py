"""``evaluate``, ``predict`` and what ``fit`` returns."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import batches, even_split, mlp, oracle, same_bits
from torch import nn
from torch.nn import functional as F
from versions import (
    LAYERS,
    TOLERANCE,
    parameters,
    runner_of,
    state,
)

from fdg_cuda import BatchResult, EpochResult
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("trained", [False, True], ids=["before-training", "after-training"])
def test_evaluate_and_predict_change_nothing(trained: bool) -> None:
    model, data = mlp(), batches(4)
    runner = runner_of(model, split=None)
    if trained:
        runner.fit(data)
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = state(model)
    found = runner.evaluate(data)
    outputs = torch.cat([runner.predict(x) for x, _ in data])
    assert [module.training for module in model.modules()] == modes
    assert same_bits(state(model), before)
    assert not outputs.requires_grad
    assert all(p.grad is None for p in parameters(model))

    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = torch.cat([plain(x) for x, _ in data])
    assert torch.equal(outputs, expected)
    targets = torch.cat([y for _, y in data])
    assert found.samples == len(targets) == 27
    assert found.loss == pytest.approx(float(F.cross_entropy(expected, targets)), rel=1e-12)
    assert found.accuracy == float((expected.argmax(1) == targets).double().mean())


def test_evaluate_is_weighted_by_samples() -> None:
    """The last batch holds one sample of eight; a mean over batches would count it as a half."""
    model = mlp(batch_norm=False)
    (x, y), (last_x, last_y) = batches(2, size=7, last=1)
    runner = runner_of(model)
    losses = [runner.evaluate([batch]).loss for batch in ((x, y), (last_x, last_y))]
    found = runner.evaluate([(x, y), (last_x, last_y)])
    assert found.loss == pytest.approx((7 * losses[0] + losses[1]) / 8, rel=1e-12)
    assert found.loss != pytest.approx(sum(losses) / 2, rel=1e-3)


def test_evaluate_restores_the_modes_after_an_exception() -> None:
    model = mlp()
    runner = runner_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        runner.evaluate([(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2).long())])
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    runner.fit(batches(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 3])
def test_history_and_on_batch_are_in_batch_order(stages: int, method: str) -> None:
    data, model = batches(6), mlp()
    split = even_split(LAYERS, stages)
    _, recorded = oracle(model, split, data, epochs=2, lr=0.05, method=method)
    reported: list[BatchResult] = []
    runner = runner_of(model, stages, method=method)
    history = runner.fit(data, epochs=2, on_batch=reported.append)
    assert all(type(loss) is float for loss in history.batch_losses)
    assert history.batch_losses == pytest.approx(recorded.losses, rel=TOLERANCE)
    assert [result.loss for result in reported] == history.batch_losses
    assert [(r.epoch, r.batch) for r in reported] == [(e, b) for e in range(2) for b in range(6)]
    assert [r.samples for r in reported] == [8, 8, 8, 8, 8, 3] * 2
    for epoch, result in enumerate(history.epochs):
        mine = reported[6 * epoch : 6 * epoch + 6]
        assert (result.epoch, result.batches, result.samples) == (epoch, 6, 43)
        assert result.loss == pytest.approx(sum(r.loss * r.samples for r in mine) / 43)
        assert result.accuracy == sum(r.correct or 0 for r in mine) / 43


def test_no_epochs() -> None:
    model = mlp()
    before = state(model)
    history = runner_of(model, split=None).fit(batches(2), epochs=0)
    assert history.batch_losses == history.epochs == []
    assert same_bits(state(model), before)


def test_history_of_an_interrupted_fit() -> None:
    runner = runner_of(mlp())
    assert runner.history is None

    def stop(result: EpochResult) -> None:
        if result.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.fit(batches(4), epochs=5, on_epoch=stop)
    assert runner.history is not None
    assert len(runner.history.epochs) == 2
    assert len(runner.history.batch_losses) == 8


def test_one_class_wants_another_loss() -> None:
    model = mlp()
    model[-1] = nn.Linear(12, 1).double()
    data = [(x, x.sum(dim=1, keepdim=True)) for x, _ in batches(3)]
    with pytest.raises(ValueError, match="mse_loss"):
        runner_of(model).fit(data)
    assert len(runner_of(model, loss_fn=F.mse_loss).fit(data).batch_losses) == 3


def test_what_a_runner_says_of_itself() -> None:
    assert repr(runner_of(mlp())) == "FDGRunner('fdg' on cpu, cpu, split=[4])"
