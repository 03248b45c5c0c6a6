"""float16: scaled losses, and updates left out where gradients are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, Batch, cut, largest_difference, same_bits
from crashes import Crash, CrashError
from overflows import SPLIT, WIDTH, overflowing, single
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import BatchResult, Checkpoints, FDGRunner, NonFiniteLossError, reference
from fdg_cuda.loss_scale import LossScale
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

FLOAT16 = torch.float16
FIRST = 2.0**12  # of these tests: small enough that nothing overflows by itself


def runner_of(model: nn.Sequential, *, first: float = FIRST, **options: Any) -> FDGRunner:
    """In float16, in three stages or as ``split`` says."""
    split = options.pop("split", SPLIT)
    if "optimizer" not in options:
        options.setdefault("lr", 0.05)
    runner = FDGRunner(
        model, ["cpu"] * (len(split) + 1), split=split, precision="float16", **options
    )
    runner._loss_scale = LossScale(first)
    return runner


# -- one stage: torch's own scaler ---------------------------------------------------------------


class Plain:
    """Training as torch's documentation tells, with ``torch.amp.GradScaler``."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.options = model, options
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST)

    def train(self, data: list[Batch]) -> None:
        group = self.options.get("accumulate", 1)
        for number, (x, y) in enumerate(data):
            with torch.autocast("cpu", FLOAT16):
                loss = F.cross_entropy(self.model(x), y) / group
            torch.autograd.backward(self.scaler.scale(loss))
            if (number + 1) % group == 0:
                self.step()

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if "clip_norm" in self.options:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options["clip_norm"])
        if "clip_value" in self.options:
            nn.utils.clip_grad_value_(self.model.parameters(), self.options["clip_value"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 0.3}, {"clip_value": 0.05}, {"accumulate": 2}],
    ids=str,
)
@pytest.mark.parametrize("at", [(), (2, 7)], ids=["finite", "overflows"])
def test_one_stage_is_torch_bit_for_bit(at: Sequence[int], options: dict[str, Any]) -> None:
    """The scale falls later here, which a power of two makes no difference."""
    model, data = overflowing(at), single()
    plain = copy.deepcopy(model)
    runner = runner_of(model, split=[], **options)
    epoch = runner.fit(data).epochs[0]
    Plain(plain, **options).train(data)
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0
    assert epoch.skipped == (len(at),)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -- several stages: the oracle ------------------------------------------------------------------


class UnderAutocast(nn.Module):
    """A stage as the oracle gets it."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", FLOAT16, cache_enabled=False):
            output: Tensor = self.layers(x)
        return output


def scaled_loss(output: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", FLOAT16):
        return F.cross_entropy(output, target) * FIRST


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


class Skipping:
    """Makes optimizers, stage by stage, that take scaled gradients and leave some steps out."""

    def __init__(self, make: Callable[[Any], Any], skipped: Sequence[Sequence[int]]) -> None:
        self.make, self.skipped, self.stage = make, skipped, 0

    def __call__(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        made, left_out, steps = self.make(params), self.skipped[self.stage], iter(range(1000))
        self.stage += 1
        step = made.step

        def sometimes() -> None:
            if next(steps) in left_out:
                return
            for parameter in params:
                if parameter.grad is not None:
                    parameter.grad *= 1 / FIRST
            step()

        made.step = sometimes
        return made  # type: ignore[no-any-return]


def agrees_with_oracle(
    at: Sequence[int],
    skipped: Sequence[Sequence[int]],
    *,
    stage: int = 1,
    count: int = 12,
    **options: Any,
) -> FDGRunner:
    """``skipped``: the updates that are left out, per stage."""
    data, make = single(count), options.get("optimizer", sgd)
    twins = cut(overflowing(), SPLIT)
    expected = reference.train(
        [UnderAutocast(twin) for twin in twins],
        data,
        loss_fn=scaled_loss,
        **{**options, "optimizer": Skipping(make, skipped)},
    )
    model = overflowing(at, stage=stage)
    runner = runner_of(model, **options)
    history = runner.fit(data)
    assert history.batch_losses == [loss / FIRST for loss in expected.losses]
    whole = nn.Sequential(*(layer for twin in twins for layer in twin))
    assert largest_difference(model.state_dict(), whole.state_dict()) == 0
    assert history.epochs[0].skipped == tuple(map(len, skipped))
    assert history.epochs[0].loss_scale == runner.loss_scale
    return runner


@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
def test_an_overflow_leaves_out_that_batch_there_and_below(
    method: str, backward_weights: str
) -> None:
    """Weights and momentum elsewhere, and later, are as if nothing had been. What the overflowing
    stage passes down would be finite."""
    runner = agrees_with_oracle(
        (0, 10), [(0, 10), (0, 10), ()], method=method, backward_weights=backward_weights
    )
    assert runner.loss_scale == FIRST / 4


@pytest.mark.parametrize("stage", [0, 2])
def test_at_the_first_and_the_last_stage(stage: int) -> None:
    skipped = [(4,) if k <= stage else () for k in range(3)]
    agrees_with_oracle((4,), skipped, stage=stage)


@pytest.mark.parametrize("backward_weights", ["stash", "current"])
def test_one_batch_leaves_out_the_whole_update_of_several(backward_weights: str) -> None:
    """Batches 5 and 6 are of update 1, batch 12 of the last, which takes the two that are left."""
    left_out = (1, 3)
    agrees_with_oracle(
        (5, 6, 12),
        [left_out, left_out, ()],
        count=14,
        accumulate=4,
        backward_weights=backward_weights,
    )


def test_a_torch_optimizer_does_not_see_the_batch() -> None:
    """Its count of steps, which corrects Adam's bias, stays too."""
    runner = agrees_with_oracle((0, 4), [(0, 4), (0, 4), ()], optimizer=adamw)
    steps = [
        {int(state["step"]) for state in stage.optimizer_state().values()}
        for stage in runner.stages
    ]
    assert steps == [{10}, {10}, {12}]


def test_a_change_of_scale_in_mid_flight_changes_no_bit() -> None:
    """Each batch is divided by what it was multiplied by."""
    results = []
    for scale in (LossScale(FIRST), LossScale(FIRST / 8, patience=2)):
        model = overflowing()
        runner = runner_of(model)
        runner._loss_scale = scale
        runner.fit(single(30), epochs=2)
        results.append(runner.state_dict())
    assert scale.value > FIRST
    assert same_bits(*results)


# -- what a layer would hide ---------------------------------------------------------------------


class InfiniteWhereNegative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return error.masked_fill(x <= 0, math.inf)


class Spoiling(nn.Module):
    """Passes down infinities that the ReLU below swallows."""

    def forward(self, x: Tensor) -> Tensor:
        return InfiniteWhereNegative.apply(x)  # type: ignore[no-any-return]


def test_an_infinity_that_a_layer_swallows_counts() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, WIDTH), nn.ReLU(), Spoiling(), nn.Linear(WIDTH, CLASSES)]
    model = nn.Sequential(*layers)
    before = copy.deepcopy(model.state_dict())
    epoch = runner_of(model, split=[2]).fit(single(5)).epochs[0]
    assert epoch.skipped == (5, 0)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


# -- when the scale reacts -----------------------------------------------------------------------


def seen_scales(scales: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        loss.register_hook(lambda start: scales.append(start.item()))
        return loss

    return loss_fn


@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
def test_it_reacts_a_fixed_number_of_batches_later(method: str) -> None:
    scales: list[float] = []
    runner = runner_of(overflowing((3,)), method=method, loss_fn=seen_scales(scales))
    runner.fit(single(20))
    lag = runner.schedule.latency + MAX_TICKS_IN_FLIGHT + 1
    assert scales == [FIRST] * (3 + lag) + [FIRST / 2] * (20 - 3 - lag)


def test_at_the_end_of_an_epoch_all_batches_are_known() -> None:
    scales: list[float] = []
    runner = runner_of(overflowing((5,)), loss_fn=seen_scales(scales))
    runner.fit(single(6), epochs=2)
    assert scales == [FIRST] * 6 + [FIRST / 2] * 6


def test_timing_changes_no_bit() -> None:
    results, trajectories = [], []
    for seed in range(4):
        scales: list[float] = []
        runner = runner_of(overflowing((2, 3, 15)), loss_fn=seen_scales(scales))
        runner._machine.injected_delays = (seed, 300 if seed else 0)  # type: ignore[attr-defined]
        history = runner.fit(single(30))
        assert history.epochs[0].skipped == (3, 3, 0)
        results.append(runner.state_dict())
        trajectories.append(scales)
    assert len(set(trajectories[0])) == 3
    assert all(other == trajectories[0] for other in trajectories[1:])
    assert all(same_bits(results[0], other) for other in results[1:])


# -- losses that are not finite ------------------------------------------------------------------


def spoiled(data: list[Batch], *numbers: int) -> list[Batch]:
    """float16 has no such inputs."""
    return [(x * 1e6 if n in numbers else x, y) for n, (x, y) in enumerate(data)]


def without_batch_norm() -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH)]
    layers += [nn.Tanh() if n % 2 else nn.Linear(WIDTH, WIDTH) for n in range(7)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


class DefiniteLoss:
    """Infinite for the ``at``-th batch, with gradients that are finite."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(output, target)
        return loss + math.inf if self.calls - 1 == self.at else loss


def test_a_loss_that_is_not_finite_leaves_out_the_batch_everywhere() -> None:
    data = single(12, last=None)
    seen: list[BatchResult] = []
    runner = runner_of(without_batch_norm(), loss_fn=DefiniteLoss(5))
    history = runner.fit(data, on_batch=seen.append)
    epoch = history.epochs[0]
    assert epoch.skipped == (1, 1, 1)
    assert [math.isfinite(loss) for loss in history.batch_losses] == [n != 5 for n in range(12)]
    assert [result.loss for result in seen] == history.batch_losses
    finite = [loss for loss in history.batch_losses if math.isfinite(loss)]
    assert epoch.loss == pytest.approx(sum(finite) / 11, rel=1e-12)
    assert (epoch.batches, epoch.samples) == (12, 88)


def test_the_runs_batches_may_all_be_without_numbers() -> None:
    runner = runner_of(without_batch_norm())
    epoch = runner.fit(spoiled(single(2), 0, 1)).epochs[0]
    assert math.isnan(epoch.loss)
    assert (epoch.accuracy, epoch.samples, epoch.skipped) == (None, 0, (2, 2, 2))


@pytest.mark.parametrize("gradients", [False, True], ids=["loss", "gradients"])
def test_where_no_scale_helps_training_stops(gradients: bool) -> None:
    data = single(12)
    model = overflowing(range(10, 100)) if gradients else without_batch_norm()
    twin = copy.deepcopy(model)
    runner = runner_of(model, first=2.0**-9)
    runner.fit(data[:10])
    runner_of(twin, first=2.0**-9).fit(data[:10])
    with pytest.raises(NonFiniteLossError) as caught:
        runner.fit(data if gradients else spoiled(data, *range(12)), epochs=3)
    assert math.isfinite(caught.value.loss) == gradients
    assert ("gradients (under the smallest loss scale, 0.000976562)" in str(caught.value)) == (
        gradients
    )
    # The first that entered under the smallest scale; all is as before this epoch.
    assert (caught.value.epoch, caught.value.batch) == (0, 9)
    assert runner.loss_scale == 2.0**-9
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


# -- checkpoints ---------------------------------------------------------------------------------


def test_going_on_gives_the_same_bits(tmp_path: Path) -> None:
    """The scale, its count and the epoch's count of skipped updates go on, too."""
    data = spoiled(single(12), 1, 7)

    def run(folder: Path, crash: int, *, resume: bool = False) -> dict[str, Tensor]:
        runner = runner_of(without_batch_norm())
        runner._loss_scale = LossScale(FIRST, patience=4)
        checkpoints = Checkpoints(folder, every=4, resume=resume)
        history = runner.fit(data, 2, callbacks=[Crash(crash)], checkpoints=checkpoints)
        return {
            **runner.state_dict(),
            "scale": torch.tensor([runner.loss_scale]),
            "skipped": torch.tensor([epoch.skipped for epoch in history.epochs]),
            "updates": torch.tensor([epoch.updates for epoch in history.epochs]),
            "losses": torch.tensor(history.batch_losses).nan_to_num(nan=-1),
            "momentum": torch.cat([stage.memory.momentum for stage in runner.stages]),
        }

    expected = run(tmp_path / "whole", 100)
    assert expected["skipped"].tolist() == [[2, 2, 2]] * 2
    assert expected["updates"].tolist() == [12, 12]
    for crash in (9, 20):
        folder = tmp_path / str(crash)
        with pytest.raises(CrashError):
            run(folder, crash)
        assert same_bits(run(folder, 100, resume=True), expected)


# -- refusals and what is shown ------------------------------------------------------------------


@pytest.mark.parametrize(("every", "updates"), [(None, 4), (6, 4), (4, 6)])
def test_updates_count_what_each_drain_makes_of_the_batches_left(
    tmp_path: Path, every: int | None, updates: int
) -> None:
    """A drain updates with what there is of a group: 12 batches in threes, or in 3 + 1 three times."""
    checkpoints = None if every is None else Checkpoints(tmp_path, every=every)
    runner = runner_of(without_batch_norm(), accumulate=3)
    epoch = runner.fit(single(12), checkpoints=checkpoints).epochs[0]
    assert epoch.updates == updates


def test_a_smaller_first_scale_is_where_it_begins() -> None:
    runner = FDGRunner(overflowing(), ["cpu"], precision="float16", initial_loss_scale=2, lr=0.05)
    assert runner.loss_scale == 2.0
    epoch = runner.fit(single(2)).epochs[0]
    assert (epoch.skipped, epoch.loss_scale) == ((0,), 2.0)


@pytest.mark.parametrize("first", [0, -2.0, 1000, 3, 2.0**-11, 2.0**128, math.inf, math.nan])
def test_a_first_scale_out_of_range(first: float) -> None:
    with refused(ValueError, "initial_loss_scale", "power of two", repr(first)):
        FDGRunner(overflowing(), ["cpu"], precision="float16", initial_loss_scale=first)


def test_a_first_scale_that_is_no_number_or_does_nothing() -> None:
    with refused(TypeError, "initial_loss_scale", "'1024'"):
        FDGRunner(
            overflowing(),
            ["cpu"],
            precision="float16",
            initial_loss_scale="1024",  # type: ignore[arg-type]
        )
    with refused(ValueError, "initial_loss_scale=1024", "precision='float16'", "leave it out"):
        FDGRunner(overflowing(), ["cpu"], initial_loss_scale=1024)


def test_other_precisions_have_no_scale() -> None:
    runner = FDGRunner(overflowing(), ["cpu"], lr=0.05)
    epoch = runner.fit(single(2)).epochs[0]
    assert (runner.loss_scale, epoch.skipped, epoch.loss_scale) == (None, None, None)


def test_a_float64_model_is_refused() -> None:
    with refused(ValueError, "float16", "torch.float64", "model.float()"):
        FDGRunner(overflowing().double(), ["cpu"], precision="float16")
