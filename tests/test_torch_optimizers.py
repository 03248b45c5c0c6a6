"""Any torch optimizer, one per stage."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import (
    batches,
    compare,
    convolutional,
    cut,
    even_split,
    images,
    largest_difference,
    mlp,
    oracle,
)
from refusals import refused
from torch import Tensor, nn

from fdg_cuda import FDGRunner, NonFiniteLossError, no_decay_on_norm_and_bias, reference
from fdg_cuda.schedule import METHODS

TOLERANCE = 1e-10
Make = Callable[[list[Any]], torch.optim.Optimizer]


def adamw(params: list[Any]) -> torch.optim.Optimizer:
    # A larger eps, or what only rounding makes of a zero gradient would count.
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, eps=1e-6)


def fused_adam(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, fused=True)


def foreach_rmsprop(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=1e-3, momentum=0.5, foreach=True)


def adagrad(params: list[Any]) -> torch.optim.Optimizer:
    """Makes its state when it is made."""
    return torch.optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.1)


def nadam(params: list[Any]) -> torch.optim.Optimizer:
    """Its running product is float32, whatever the weights are. A larger eps, as above."""
    return torch.optim.NAdam(params, lr=1e-2, eps=1e-6)


def sgd(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


# A sign turns the rounding of a sum, which differs with the number of threads, into a whole step.
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class InPlace(torch.optim.Optimizer):
    """Signed descent that spoils its gradients, as some optimizers do."""

    def __init__(self, params: list[Any]) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.add_(parameter.grad.sign_(), alpha=-group["lr"])


MAKERS: list[Make] = [adamw, fused_adam, foreach_rmsprop, adagrad, nadam, InPlace]


@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_agrees_with_the_oracle(stages: int, method: str, backward_weights: str) -> None:
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(9),
        epochs=2,
        method=method,
        backward_weights=backward_weights,
        optimizer=adamw,
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.3}, {"clip_value": 0.05}], ids=str)
def test_all_kinds_agree_with_the_oracle(make: Make, clip: dict[str, Any]) -> None:
    assert compare(mlp(), [2, 5], batches(9), optimizer=make, **clip) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [*MAKERS, sgd])
def test_one_stage_is_torch_bit_for_bit(make: Make, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    plain = copy.deepcopy(model)
    data = [(x.to(dtype), y) for x, y in batches()]
    runner = FDGRunner(model, ["cpu"], optimizer=make)
    schedule = torch.optim.lr_scheduler.ExponentialLR(runner.optimizer, 0.9)
    runner.fit(data, epochs=2, lr_scheduler=schedule, lr_step="batch")
    optimizer = make(list(plain.parameters()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for x, y in data * 2:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(plain(x), y))
        optimizer.step()
        schedule.step()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_torchs_sgd_is_the_fused_one(stages: int) -> None:
    split, model, fused = even_split(8, stages), mlp(), mlp()
    FDGRunner(model, ["cpu"] * stages, split=split, optimizer=sgd).fit(batches(), epochs=2)
    FDGRunner(fused, ["cpu"] * stages, split=split, lr=0.05, nesterov=True).fit(batches(), epochs=2)
    assert largest_difference(model.state_dict(), fused.state_dict()) < 1e-12


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_parameter_groups(stages: int) -> None:
    """The oracle's stages divide their parameters themselves. And so the fused update's groups are
    checked with several stages too."""

    def divided(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        few = {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.02}
        many = {"params": [p for p in params if p.ndim > 1]}
        return torch.optim.SGD([many, few], lr=0.05, momentum=0.9, weight_decay=5e-3)

    def rule(name: str, parameter: Tensor) -> dict[str, float] | None:
        return {"weight_decay": 0.0, "lr": 0.02} if parameter.ndim <= 1 else None

    def plain(params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-3)

    split = even_split(8, stages)
    expected, _ = oracle(mlp(), split, batches(9), epochs=2, optimizer=divided)
    for options in (
        {"optimizer": divided},
        {"optimizer": plain, "param_groups": rule},
        {"lr": 0.05, "weight_decay": 5e-3, "param_groups": rule},
    ):
        runner = FDGRunner(mlp(), ["cpu"] * stages, split=split, **options)  # type: ignore[arg-type]
        runner.fit(batches(9), epochs=2)
        assert largest_difference(runner.state_dict(), expected) < TOLERANCE


def test_a_batch_keeps_its_rate_in_every_stage() -> None:
    model, split, rates = mlp(), [2, 5], [0.01 / (1 + n) for n in range(30)]
    parts = cut(model, split)
    reference.train(parts, batches(), epochs=3, optimizer=adamw, lr=lambda n: rates[n])
    runner = FDGRunner(model, ["cpu"] * 3, split=split, optimizer=adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(runner.optimizer, lambda n: 1 / (1 + n))
    runner.fit(batches(), epochs=3, lr_scheduler=schedule, lr_step="batch")
    whole = nn.Sequential(*(layer for part in parts for layer in part))
    assert largest_difference(model.state_dict(), whole.state_dict()) < TOLERANCE


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedules_of_several_values_and_rates_that_are_tensors(tensor_lr: bool) -> None:
    def make(params: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)

    def schedule_of(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=21)

    model, plain = mlp(), mlp()
    runner = FDGRunner(model, ["cpu"], optimizer=make)
    runner.fit(batches(), 2, lr_scheduler=schedule_of(runner.optimizer), lr_step="batch")
    optimizer = make(list(plain.parameters()))
    schedule = schedule_of(optimizer)
    for x, y in batches() * 2:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(plain(x), y))
        optimizer.step()
        schedule.step()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


class OnDevice(Tensor):
    """Says it is on a CUDA device."""

    is_cuda = True


def test_rates_on_a_cuda_device_reach_the_stages_as_numbers() -> None:
    """A copy would be made on the caller's stream, and read on the stage's without a wait."""
    rates: list[Any] = []

    class Seen(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    def make(params: list[Any]) -> torch.optim.Optimizer:
        return Seen(params, lr=torch.tensor(0.5).as_subclass(OnDevice))

    runner = FDGRunner(mlp(), ["cpu"], optimizer=make)
    schedule = torch.optim.lr_scheduler.ExponentialLR(runner.optimizer, 0.5)
    runner.fit(batches(3), lr_scheduler=schedule, lr_step="batch")
    assert rates == [0.5, 0.25, 0.125]
    assert {type(rate) for rate in rates} == {float}


def test_the_face_has_the_factorys_groups_over_the_models_parameters() -> None:
    model = mlp()
    runner = FDGRunner(
        model, ["cpu"], optimizer=adamw, beta=0.25, param_groups=no_decay_on_norm_and_bias
    )
    default, without = runner.optimizer.param_groups
    assert (default["lr"], default["weight_decay"], default["beta"]) == (1e-2, 0.1, 0.25)
    assert (without["lr"], without["weight_decay"], without["betas"]) == (1e-2, 0.0, (0.9, 0.999))
    assert [*map(id, default["params"])] == [id(p) for p in model.parameters() if p.ndim > 1]
    with refused(ValueError, "param_groups="):
        runner.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_state_survives_between_fits_and_changes_of_layout() -> None:
    """Two fits of an epoch are one of two; a parameter that was frozen keeps its state."""
    data = batches()
    whole, halves = (FDGRunner(mlp(), ["cpu"] * 2, split=[4], optimizer=adamw) for _ in range(2))
    whole.fit(data, epochs=2)
    for _ in range(2):
        halves.fit(data)
    assert largest_difference(whole.state_dict(), halves.state_dict()) == 0

    model = mlp()
    runner = FDGRunner(model, ["cpu"] * 2, split=[4], optimizer=adamw)
    runner.fit(data)
    frozen = model[0].weight
    before = runner.stages[0].optimizer_state()[frozen]
    assert float(before["step"]) == len(data)
    frozen.requires_grad_(False)
    runner.fit(data)
    kept = runner.stages[0].optimizer_state()
    assert torch.equal(kept[frozen]["exp_avg"], before["exp_avg"])
    assert float(kept[model[0].bias]["step"]) == 2 * len(data)
    frozen.requires_grad_(True)
    runner.fit(data)
    assert float(runner.stages[0].optimizer_state()[frozen]["step"]) == 2 * len(data)


@pytest.mark.parametrize("make", [adamw, adagrad])
def test_a_parameter_thawed_later_begins_as_in_torch(make: Make) -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    runner = FDGRunner(model, ["cpu"], optimizer=make)
    optimizer = make(list(plain.parameters()))
    for frozen in (True, False):
        for each in (model, plain):
            each[2].weight.requires_grad_(not frozen)
        runner.fit(batches())
        for x, y in batches():
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(plain(x), y))
            optimizer.step()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


def test_what_is_not_in_a_loaded_state_begins_as_in_a_new_optimizer() -> None:
    used, new = (FDGRunner(mlp(), ["cpu"], optimizer=adagrad) for _ in range(2))
    used.fit(batches())
    new.load_state_dict(used.state_dict())
    used.stages[0].load_optimizer_state({})
    for each in (used, new):
        each.fit(batches())
    assert largest_difference(used.state_dict(), new.state_dict()) == 0


@pytest.mark.parametrize("make", [adamw, nadam])
def test_the_state_follows_weights_that_are_converted(make: Make) -> None:
    data = batches()
    model = mlp().float()
    runner = FDGRunner(model, ["cpu"], optimizer=make)
    runner.fit([(x.float(), y) for x, y in data])
    before = runner.stages[0].optimizer_state()[model[0].weight]
    model.double()
    runner.fit(data[:1])
    after = runner.stages[0].optimizer_state()[model[0].weight]
    assert float(after["step"]) == len(data) + 1
    assert before["exp_avg"].dtype == torch.float32
    assert after["exp_avg"].dtype == torch.float64


def test_a_state_from_a_file_lies_as_its_parameter() -> None:
    """A file keeps no strides; torch's fast paths want those of the weights."""
    model = convolutional()
    runner = FDGRunner(model, ["cpu"], optimizer=adamw)
    runner.fit(images(1, channels_last=True))
    (stage,) = runner.stages
    contiguous = {
        p: {name: value.contiguous() for name, value in state.items()}
        for p, state in stage.optimizer_state().items()
    }
    weight = model[0].weight
    assert contiguous[weight]["exp_avg"].stride() != weight.stride()
    stage.load_optimizer_state(contiguous)
    state = stage.optimizer_state()[weight]
    assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == weight.stride()
    assert torch.equal(state["exp_avg"], contiguous[weight]["exp_avg"])


@pytest.mark.parametrize(
    "options",
    [{"optimizer": adamw}, {"optimizer": adagrad}, {"optimizer": nadam}, {"lr": 0.05}],
    ids=["adamw", "adagrad", "nadam", "fused"],
)
@pytest.mark.parametrize("fitted", [False, True], ids=["new runner", "used runner"])
def test_a_loaded_state_goes_on_bit_for_bit(options: dict[str, Any], fitted: bool) -> None:
    data = batches()
    model = mlp()
    runner = FDGRunner(model, ["cpu"] * 2, split=[4], **options)
    runner.fit(data)
    weights = runner.state_dict()
    states = [stage.optimizer_state() for stage in runner.stages]
    names = {id(p): name for name, p in model.named_parameters()}
    saved = {names[id(p)]: state for each in states for p, state in each.items()}
    assert saved.keys() == set(names.values())
    runner.fit(data)

    other = mlp(seed=5)
    resumed = FDGRunner(other, ["cpu"] * 2, split=[4], **options)
    if fitted:
        resumed.fit(data)
    resumed.load_state_dict(weights)
    named = dict(other.named_parameters())
    for stage in resumed.stages:
        own = {id(p) for layer in stage.layers for p in layer.parameters()}
        stage.load_optimizer_state({named[n]: s for n, s in saved.items() if id(named[n]) in own})
    for state in saved.values():  # it was copied
        for value in state.values():
            value.fill_(7)
    resumed.fit(data)
    assert largest_difference(runner.state_dict(), resumed.state_dict()) == 0


def test_states_that_cannot_be_loaded() -> None:
    adam = FDGRunner(mlp(), ["cpu"], optimizer=adamw)
    adam.fit(batches(2))
    model = mlp()
    fused = FDGRunner(model, ["cpu"])
    fused.fit(batches(2))
    (stage,) = fused.stages
    with refused(ValueError, "exp_avg", "optimizer="):
        stage.load_optimizer_state({model[0].weight: {"exp_avg": torch.zeros(12, 6)}})
    with refused(ValueError, "stage 0"):
        stage.load_optimizer_state(adam.stages[0].optimizer_state())


@pytest.mark.parametrize("make", [adamw, adagrad, nadam])
def test_after_a_loss_that_is_no_number_the_state_is_that_of_the_epochs_begin(make: Make) -> None:
    data = batches()
    spoiled = [*data[:6], (data[6][0] * float("nan"), data[6][1]), *data[7:]]
    model, plain = mlp(batch_norm=False), mlp(batch_norm=False)
    runner = FDGRunner(model, ["cpu"] * 2, split=[4], optimizer=make)
    other = FDGRunner(plain, ["cpu"] * 2, split=[4], optimizer=make)
    with pytest.raises(NonFiniteLossError):
        runner.fit(spoiled)
    for each in (runner, other):
        each.fit(data)
    with pytest.raises(NonFiniteLossError):
        runner.fit(spoiled)
    for each in (runner, other):
        each.fit(data)
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


def test_a_stage_without_parameters_has_no_optimizer() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(6, 4)).double()
    assert compare(model, [1], batches(5), optimizer=adamw) < TOLERANCE


def test_no_momentum_of_the_fused_update_is_held() -> None:
    runner = FDGRunner(mlp(), ["cpu"] * 2, split=[4], optimizer=adamw)
    runner.fit(batches(3))
    assert not any(stage.memory.has_momentum for stage in runner.stages)


def test_nothing_keeps_the_runner_alive() -> None:
    runner = FDGRunner(mlp(), ["cpu"] * 2, split=[4], optimizer=adamw)
    runner.fit(batches(3))
    watched = [weakref.ref(stage.memory.weights[0]) for stage in runner.stages]
    del runner
    gc.collect()
    assert [each() for each in watched] == [None, None]


class Stops(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise ArithmeticError("no step today")


def test_what_an_optimizer_raises_arrives_and_the_weights_are_whole() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    runner = FDGRunner(model, ["cpu"] * 2, split=[4], optimizer=lambda params: Stops(params))
    with pytest.raises(ArithmeticError, match="no step today"):
        runner.fit(batches(5))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# -- what cannot be -----------------------------------------------------------------------------------


def half(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params[::2])


def own(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        (torch.optim.LBFGS, ValueError, ("LBFGS", "closure")),
        (torch.optim.SparseAdam, ValueError, ("SparseAdam", "sparse")),
        (lambda params: None, TypeError, ("NoneType", "AdamW(params")),
        (half, ValueError, ("the model", "leaves out", "requires_grad_(False)")),
        (own, ValueError, ("the model", "1 others")),
        ("adamw", TypeError, ("str", "AdamW(params")),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))]), TypeError, ("made already",)),
    ],
)
def test_factories_that_cannot_be(factory: Any, error: type[Exception], words: Any) -> None:
    with refused(error, *words):
        FDGRunner(mlp(), ["cpu"], optimizer=factory)


@pytest.mark.parametrize(
    "given", [{"lr": 0.1}, {"momentum": 0.0}, {"weight_decay": 5e-4}, {"nesterov": True}], ids=str
)
def test_arguments_of_the_fused_sgd_exclude_a_factory(given: dict[str, Any]) -> None:
    """Even where they have the default's value."""
    with refused(ValueError, *given, "factory"):
        FDGRunner(mlp(), ["cpu"], optimizer=adamw, **given)


def test_other_arguments_that_cannot_be() -> None:
    with refused(ValueError, "'momentum'", "betas"):
        FDGRunner(mlp(), ["cpu"], optimizer=adamw, param_groups={"*": {"momentum": 0.9}})
    with refused(ValueError, "beta", "2.0"):
        FDGRunner(mlp(), ["cpu"], optimizer=adamw, beta=2.0)


def test_a_factory_that_makes_other_groups_for_a_stage() -> None:
    def by_size(params: list[Any]) -> torch.optim.Optimizer:
        if len(params) < 9:
            return torch.optim.SGD(params)
        return torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}])

    runner = FDGRunner(mlp(), ["cpu"] * 2, split=[4], optimizer=by_size)
    with refused(ValueError, "2 parameter groups", "1 for stage 0", "param_groups="):
        runner.fit(batches(3))
