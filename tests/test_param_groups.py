"""Parameter groups: hyper-parameters of their own for some parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from chains import batches, even_split, largest_difference, mlp, oracle
from refusals import refused
from torch import Tensor, nn

from fdg_cuda import FDGRunner, no_decay_on_norm_and_bias

TOLERANCE = 1e-10
# A different rate, rule and factor in one group, no decay in another.
PATTERNS: dict[str, dict[str, Any]] = {
    "0.*": {"lr": 0.02, "nesterov": True},
    "*.bias": {"weight_decay": 0.0, "momentum": 0.0},
}


def by_pattern(name: str, parameter: Tensor) -> dict[str, Any] | None:
    """What PATTERNS says, as a function."""
    if name.startswith("0."):
        return PATTERNS["0.*"]
    return PATTERNS["*.bias"] if name.endswith(".bias") else None


def torch_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The same groups as ``torch.optim.SGD`` takes them."""
    members: dict[int, list[nn.Parameter]] = {0: [], 1: [], 2: []}
    for name, parameter in model.named_parameters():
        rule = by_pattern(name, parameter)
        members[0 if rule is None else 1 if "lr" in rule else 2].append(parameter)
    own: list[Mapping[str, Any]] = [{}, *PATTERNS.values()]
    return [{"params": members[i], **own[i]} for i in range(3)]


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """Moves the rate and the momentum of every group, each between bounds of its own."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.1, 0.05, 0.2], total_steps=41, base_momentum=[0.8, 0.7, 0.6]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [None, one_cycle], ids=["constant", "one cycle"])
def test_one_stage_is_torch_sgd_with_the_same_groups_bit_for_bit(
    make: Callable[[torch.optim.Optimizer], Any] | None, dtype: torch.dtype
) -> None:
    model = mlp().to(dtype)
    plain = copy.deepcopy(model)
    data = [(x.to(dtype), y) for x, y in batches()]
    runner = FDGRunner(model, ["cpu"], lr=0.05, param_groups=PATTERNS)
    assert [len(g["params"]) for g in runner.optimizer.param_groups] == [
        len(g["params"]) for g in torch_groups(plain)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = make(runner.optimizer) if make else None
        runner.fit(data, epochs=4, lr_scheduler=schedule, lr_step="batch")
    optimizer = torch.optim.SGD(torch_groups(plain), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = make(optimizer) if make else None
    for x, y in data * 4:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(plain(x), y))
        optimizer.step()
        if schedule:
            schedule.step()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


def test_a_function_and_patterns_make_the_same_groups() -> None:
    results = []
    for rule in (PATTERNS, by_pattern):
        model = mlp()
        runner = FDGRunner(model, ["cpu"] * 3, split=[2, 5], lr=0.05, param_groups=rule)
        runner.fit(batches())
        results.append((runner.state_dict(), len(runner.optimizer.param_groups)))
    assert results[0][1] == results[1][1] == 3
    assert largest_difference(results[0][0], results[1][0]) == 0


@pytest.mark.parametrize("method", ["fdg", "ddg"])
def test_a_group_trains_as_a_runner_trains_that_has_its_hyper_parameters_only(method: str) -> None:
    """With one layer per stage, and lr=0 in all stages but one: what a stage computes depends then
    on its own hyper-parameters alone."""
    for trained in range(3):
        model = nn.Sequential(*(nn.Linear(6, 6, bias=False).double() for _ in range(3)))
        alone, data = copy.deepcopy(model), batches()
        rule = {f"{k}.*": {"lr": 0.0} for k in range(3) if k != trained}
        rule[f"{trained}.*"] = {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.5, "beta": 0.25}
        runner = FDGRunner(model, ["cpu"] * 3, split=[1, 2], method=method, param_groups=rule)
        runner.fit(data)
        for k in range(3):
            if k != trained:
                assert torch.equal(model[k].weight, alone[k].weight)
        for k, layer in enumerate(alone):
            layer.requires_grad_(k == trained)
        expected, _ = oracle(
            alone, [1, 2], data, method=method, lr=0.03, weight_decay=0.1, momentum=0.5, beta=0.25
        )
        assert largest_difference(runner.state_dict(), expected) < TOLERANCE


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_all_parameters_in_one_group_are_a_runner_with_those_arguments(stages: int) -> None:
    split, own = even_split(8, stages), {"lr": 0.03, "nesterov": True, "beta": 0.3}
    model, other = mlp(), mlp()
    FDGRunner(model, ["cpu"] * stages, split=split, param_groups={"*": own}).fit(batches())
    FDGRunner(other, ["cpu"] * stages, split=split, **own).fit(batches())  # type: ignore[arg-type]
    assert largest_difference(model.state_dict(), other.state_dict()) == 0


def test_no_decay_on_norm_and_bias() -> None:
    """With a learning rate and zero gradients only the weight decay is left."""
    model = mlp()
    runner = FDGRunner(
        model,
        ["cpu", "cpu"],
        split=[4],
        weight_decay=0.5,
        momentum=0.0,
        param_groups=no_decay_on_norm_and_bias,
        loss_fn=lambda output, target: output.sum() * 0,
    )
    before = runner.state_dict()
    runner.fit(batches(3))
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.ndim == 1 else (1 - 0.1 * 0.5) ** 3
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-12), name


def test_a_parameter_thawed_or_replaced_between_fits_keeps_its_group() -> None:
    model = mlp(batch_norm=False)
    model[3].requires_grad_(False)
    runner = FDGRunner(
        model, ["cpu", "cpu"], split=[2], momentum=0.0, param_groups={"3.*": {"lr": 0.0}}
    )
    runner.fit(batches(3))
    model[3].requires_grad_(True)
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    before = runner.state_dict()
    runner.fit(batches(3))
    assert torch.equal(model[3].weight, before["3.weight"])
    assert not torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ({"*.gamma": {"lr": 0.1}}, ValueError, ("'*.gamma'", "matches no parameter", "0.weight")),
        ({"*": {"learning_rate": 0.1}}, ValueError, ("'learning_rate'", "lr, momentum")),
        ({"*": 0.1}, TypeError, ("0.1", "dict")),
        (lambda name, parameter: 0.1, TypeError, ("0.1", "dict", "0.weight")),
        ([{"lr": 0.1}], TypeError, ("list", "function", "mapping")),
        ({"*": {"lr": -1.0}}, ValueError, ("lr", "-1.0")),
        ({"*": {"momentum": 0.0, "nesterov": True}}, ValueError, ("nesterov", "momentum")),
        ({"*": {"beta": 2.0}}, ValueError, ("beta", "2.0")),
    ],
)
def test_rules_that_cannot_be(rule: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    with refused(error, *words):
        FDGRunner(mlp(), ["cpu"], param_groups=rule)
