"""What lasts from one ``fit`` to the next."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from chains import Batch, batches, even_split, largest_difference, mlp, same_bits
from torch import nn
from traps import TroubleError
from versions import (
    LAYERS,
    TOLERANCE,
    oracle_of,
    parameters,
    runner_of,
    state,
)

from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("whose", ["model", "runner"])
def test_load_state_dict_between_fits(whose: str) -> None:
    model, data = mlp(), batches(5)
    initial = state(model)
    runner = runner_of(model, 3, momentum=0.0)
    runner.fit(data, epochs=2)
    trained = state(model)
    assert not same_bits(trained, initial)
    (model if whose == "model" else runner).load_state_dict(initial)
    assert same_bits(state(model), initial)
    runner.fit(data, epochs=2)
    assert same_bits(state(model), trained)


def test_weights_changed_in_place_between_epochs() -> None:
    """In on_epoch, and by data= between fits: what the caller sets is what is trained."""
    model, split = mlp(), even_split(LAYERS, 3)
    runner = runner_of(model, 3, momentum=0.0)
    initial = state(model)
    runner.fit(batches(5), epochs=2, on_epoch=lambda _: model.load_state_dict(initial))
    for p in parameters(model):
        p.data = p.data.clone() * 0.5
    expected, _ = oracle_of(state(model), split, batches(5), momentum=0.0)
    runner.fit(batches(5))
    assert largest_difference(state(model), expected) < TOLERANCE


def test_layer_replaced_between_fits_is_not_passed_over() -> None:
    """Either the new layer is trained, or the runner says that it cannot."""
    model = mlp()
    runner = runner_of(model)
    runner.fit(batches(3))
    model[7] = nn.Linear(12, 4).double()
    before = state(model[7])
    try:
        runner.fit(batches(3))
    except (RuntimeError, ValueError):
        return
    assert not same_bits(state(model[7]), before)


@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_two_fits_of_one_epoch_equal_one_of_two(
    stages: int, method: str, backward_weights: str
) -> None:
    """Momentum lasts."""
    model, twin = mlp(), mlp()
    options = {"method": method, "backward_weights": backward_weights}
    runner = runner_of(model, stages, **options)
    losses = runner.fit(batches(5)).batch_losses + runner.fit(batches(5)).batch_losses
    once = runner_of(twin, stages, **options).fit(batches(5), epochs=2)
    assert losses == once.batch_losses
    assert same_bits(state(model), state(twin))


@pytest.mark.parametrize("stages", [1, 3])
def test_callers_parameters_hold_the_trained_weights(stages: int) -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    own = dict(model.named_parameters())
    wanted = {name: p.requires_grad for name, p in own.items()}
    before = state(model)
    runner = runner_of(model, stages)
    runner.fit(batches(5), epochs=2)
    now = dict(model.named_parameters())
    assert own.keys() == now.keys()
    for name, parameter in now.items():
        assert parameter is own[name]
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad is wanted[name]
        assert parameter.is_leaf
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) is not wanted[name]
    assert same_bits(runner.state_dict(), state(model))


def test_model_can_be_copied_and_saved_after_fit() -> None:
    model = mlp()
    runner = runner_of(model, 3)
    runner.fit(batches(5))
    trained = state(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 3 * sum(v.nbytes for v in trained.values()) + 20_000
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": mlp(seed=2),
    }
    copies["torch.save"].load_state_dict(torch.load(file))
    runner.fit(batches(5))
    assert not same_bits(state(model), trained)
    for how, made in copies.items():
        assert same_bits(state(made), trained), f"{how}: the copy changed with the original"
        runner_of(made).fit(batches(2))


@pytest.mark.parametrize("how", ["trained", "failed", "interrupted", "unused"])
def test_deleting_the_runner_frees_everything(how: str) -> None:
    model = mlp()

    def callback(_: object) -> None:
        if how == "failed":
            raise TroubleError
        if how == "interrupted":
            raise KeyboardInterrupt

    def train(data: list[Batch]) -> list[weakref.ref[Any]]:
        runner = runner_of(model, 3)
        if how != "unused":
            with contextlib.suppress(TroubleError, KeyboardInterrupt):
                runner.fit(data, epochs=2, on_batch=callback)
        memory = [stage.memory for stage in runner.stages]
        flat_weights = [copy for each in memory for copy in (*each.weights, each.momentum)]
        return [weakref.ref(x) for x in (runner, runner.optimizer, *runner.stages, *flat_weights)]

    data = batches(5)
    inputs = [weakref.ref(x) for x, _ in data]
    left = train(data)
    gc.collect()
    assert [x() for x in left if x() is not None] == []
    del data
    assert [x() for x in inputs if x() is not None] == []
    assert all(p.isfinite().all() for p in parameters(model))
