"""What tells a right implementation from a subtly wrong one (docs/algorithm.md), on the runner.

Every check is a function of the schedule's class, so that it can be shown to fail on a rule that is
broken by one tick.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import batches, even_split, largest_difference, mlp
from test_runner_oracle import OneTickLate, OneTickLateForward
from torch import Tensor, nn

import fdg_cuda.runner
from fdg_cuda import FDGRunner
from fdg_cuda.schedule import Kind, Schedule


def trained(model: nn.Sequential, stages: int, data: Any, epochs: int = 1, **options: Any) -> Any:
    """A copy of ``model`` after training, and its runner."""
    model = copy.deepcopy(model)
    split = options.pop("split", even_split(len(model), stages))
    runner = FDGRunner(model, ["cpu"] * stages, split=split, cpu_threads=1, **options)
    runner.fit(data, epochs=epochs)
    return model, runner


def gradients_of_the_last_batch(runner: FDGRunner) -> list[Tensor]:
    """With lr and weight decay 0 and next to no momentum its buffer is just the last gradient."""
    return [stage.memory.momentum.clone() for stage in runner.stages]


# -- checks ---------------------------------------------------------------------------------------


def check_fdg_is_ddg_at_two_stages() -> None:
    data = batches(12)
    fdg, _ = trained(mlp(), 2, data, epochs=2, method="fdg", lr=0.05)
    ddg, _ = trained(mlp(), 2, data, epochs=2, method="ddg", lr=0.05)
    assert largest_difference(fdg.state_dict(), ddg.state_dict()) == 0


def unit_stages(stages: int) -> nn.Sequential:
    """One trainable weight, at stage 0; the stages above pass on what they get."""
    first = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        first.weight.fill_(1.0)
    return nn.Sequential(first, *(nn.Identity() for _ in range(stages - 1)))


def check_stability_edge(stages: int, method: str, staleness: int) -> None:
    """Loss ½λw² without momentum: |w| grows above lr·λ = 2 sin(π/(2(2L+1))) and shrinks below."""
    edge = 2 * math.sin(math.pi / (2 * (2 * staleness + 1)))
    one = torch.ones(1, 1, dtype=torch.float64)
    for factor, grows in ((0.93, False), (1.07, True)):
        model, _ = trained(
            unit_stages(stages),
            stages,
            [(one, one)] * 600,
            split=list(range(1, stages)),
            method=method,
            lr=factor * edge,
            momentum=0.0,
            weight_decay=0.0,
            beta=1.0,
            loss_fn=lambda output, target: 0.5 * (output**2).mean(),
        )
        weight = abs(model[0].weight.item())
        assert (weight > 1) == grows, f"|w| = {weight} at {factor} of the edge {edge}"


def check_gradients_at_their_tick(stages: int = 3) -> None:
    """lr = 0: stage k's gradient of batch b is made at tick b+2K-2-k."""
    _, runner = trained(mlp(), stages, batches(6), lr=0.0)
    made = {
        (action.stage, action.batch): tick
        for tick, actions in enumerate(runner.schedule.epoch(6))
        for action in actions
        if action.kind is Kind.BACKWARD
    }
    assert made == {(k, b): b + 2 * stages - 2 - k for k in range(stages) for b in range(6)}


CHECKS: dict[str, Callable[[], None]] = {
    "fdg is ddg at K=2": check_fdg_is_ddg_at_two_stages,
    "gradients of fdg at their tick": check_gradients_at_their_tick,
    "edge fdg K=2": lambda: check_stability_edge(2, "fdg", 1),
    "edge fdg K=3": lambda: check_stability_edge(3, "fdg", 3),
    "edge fdg K=4": lambda: check_stability_edge(4, "fdg", 5),
    "edge ddg K=2": lambda: check_stability_edge(2, "ddg", 1),
    "edge ddg K=4": lambda: check_stability_edge(4, "ddg", 3),
}


@pytest.mark.parametrize("name", CHECKS)
def test_holds(name: str) -> None:
    CHECKS[name]()


class LateForFdgOnly(OneTickLate):
    """For the comparison of fdg with ddg only one of the two may be broken."""

    def delay(self, stage: int) -> int:
        return super().delay(stage) if self.method == "fdg" else Schedule.delay(self, stage)


# What breaks a check: not both sides of a comparison alike, nor a method it is not about.
BREAKS = [
    *((name, OneTickLate) for name in CHECKS if name.startswith("edge")),
    *((name, OneTickLateForward) for name in CHECKS if "fdg K" in name),
    *((name, broken) for name in CHECKS if "is ddg" in name for broken in (LateForFdgOnly,)),
    ("gradients of fdg at their tick", OneTickLate),
]


@pytest.mark.parametrize(("name", "broken"), BREAKS)
def test_fails_when_the_rule_is_broken_by_one_tick(
    name: str, broken: type[Schedule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fdg_cuda.runner, "Schedule", broken)
    with pytest.raises(AssertionError):
        CHECKS[name]()


def test_fdg_and_ddg_differ_at_three_stages() -> None:
    data = batches(12)
    fdg, _ = trained(mlp(), 3, data, method="fdg", lr=0.05)
    ddg, _ = trained(mlp(), 3, data, method="ddg", lr=0.05)
    assert largest_difference(fdg.state_dict(), ddg.state_dict()) > 1e-6


@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_without_learning_gradients_are_those_of_bp_shrunk(method: str, stages: int) -> None:
    beta, frozen = 0.5, {"lr": 0.0, "momentum": 1e-300, "weight_decay": 0.0}
    for count in (1, 2, 7):
        data = batches(7)[:count]
        delayed, runner = trained(mlp(), stages, data, method=method, beta=beta, **frozen)
        plain, bp = trained(mlp(), stages, data, method="bp", **frozen)
        for stage, (mine, theirs) in enumerate(
            zip(gradients_of_the_last_batch(runner), gradients_of_the_last_batch(bp), strict=True)
        ):
            torch.testing.assert_close(
                mine, beta ** (stages - 1 - stage) * theirs, rtol=1e-12, atol=1e-15
            )
        # BatchNorm's statistics among them
        assert largest_difference(delayed.state_dict(), plain.state_dict()) == 0


def test_stash_and_current_differ_where_a_stage_has_two_layers() -> None:
    data = batches(12)
    stash, _ = trained(mlp(), 2, data, lr=0.05)
    current, _ = trained(mlp(), 2, data, lr=0.05, backward_weights="current")
    assert largest_difference(stash.state_dict(), current.state_dict()) > 1e-6


@pytest.mark.parametrize(("weight_decay", "same"), [(0.0, True), (0.01, False)])
def test_beta_is_a_smaller_learning_rate_only_without_weight_decay(
    weight_decay: float, same: bool
) -> None:
    """Stage 0's only: the last stage keeps its lr, so its weights are frozen here."""
    model = mlp(batch_norm=False)
    for layer in list(model)[4:]:
        layer.requires_grad_(False)
    options: dict[str, Any] = {"split": [4], "weight_decay": weight_decay, "momentum": 0.9}
    shrunk, _ = trained(model, 2, batches(12), beta=0.5, lr=0.1, **options)
    slower, _ = trained(model, 2, batches(12), beta=1.0, lr=0.05, **options)
    difference = largest_difference(shrunk.state_dict(), slower.state_dict())
    assert (difference < 1e-10) == same


@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
def test_zero_gradients_decay_the_weights_the_same_for_every_beta(method: str) -> None:
    results = []
    for beta in (0.3, 1.0):
        model, _ = trained(
            mlp(batch_norm=False),
            3,
            batches(9),
            method=method,
            beta=beta,
            weight_decay=0.1,
            lr=0.1,
            loss_fn=lambda output, target: 0.0 * output.sum(),
        )
        results.append(model.state_dict())
    assert largest_difference(results[0], results[1]) == 0
    start = mlp(batch_norm=False).state_dict()["0.weight"]
    assert float(results[0]["0.weight"].abs().sum()) < 0.95 * float(start.abs().sum())


def test_weights_of_the_epoch_are_finished_when_it_ends() -> None:
    """N batches, N updates at every stage, whatever N: the pipeline drains."""
    for count in (1, 2, 3, 8):
        _, runner = trained(mlp(), 4, batches(count), epochs=3)
        assert [stage.memory.updates for stage in runner.stages] == [3 * count] * 4
