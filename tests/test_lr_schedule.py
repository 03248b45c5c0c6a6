"""Learning-rate schedules: torch's own drive the runner, and their values travel with the batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import batches, cut, largest_difference, mlp
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import StepLR

from fdg_cuda import Checkpoints, FDGRunner, reference
from fdg_cuda.metrics import BatchResult

Make = Callable[[torch.optim.Optimizer], Any]


def multi_step(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.MultiStepLR(optimizer, milestones=[2, 3], gamma=0.1)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """Moves the momentum as well."""
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=41)


@pytest.mark.parametrize(("make", "step"), [(multi_step, "epoch"), (one_cycle, "batch")])
def test_one_stage_equals_bp_in_plain_torch(make: Make, step: str) -> None:
    model, plain = mlp(), mlp()
    runner = FDGRunner(model, ["cpu"], lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when schedulers are driven in a wrong order
        runner.fit(batches(), epochs=4, lr_scheduler=make(runner.optimizer), lr_step=step)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = make(optimizer)
    for _ in range(4):
        for x, y in batches():
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(plain(x), y))
            optimizer.step()
            if step == "batch":
                schedule.step()
        if step == "epoch":
            schedule.step()
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0


@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_batch_keeps_its_learning_rate_in_every_stage(method: str, stages: int) -> None:
    model = mlp()
    split = [8 * k // stages for k in range(1, stages)]
    parts = cut(model, split)
    rates = [0.1 / (1 + n) for n in range(30)]
    reference.train(parts, batches(), epochs=3, method=method, lr=lambda n: rates[n])
    runner = FDGRunner(model, ["cpu"] * stages, split=split, method=method, lr=rates[0])
    schedule = lr_scheduler.LambdaLR(runner.optimizer, lambda n: 1 / (1 + n))
    runner.fit(batches(), epochs=3, lr_scheduler=schedule, lr_step="batch")
    whole = nn.Sequential(*(layer for part in parts for layer in part))
    assert largest_difference(model.state_dict(), whole.state_dict()) < 1e-10


def test_a_scheduler_stepped_by_hand_between_fits() -> None:
    model, other = mlp(), mlp()
    by_hand = FDGRunner(model, ["cpu", "cpu"], split=[4])
    schedule = multi_step(by_hand.optimizer)
    for _ in range(4):
        by_hand.fit(batches())
        schedule.step()
    runner = FDGRunner(other, ["cpu", "cpu"], split=[4])
    runner.fit(batches(), epochs=4, lr_scheduler=multi_step(runner.optimizer))
    assert largest_difference(model.state_dict(), other.state_dict()) == 0
    assert runner.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.01)


def test_the_optimizer_refuses_what_it_cannot_do() -> None:
    runner = FDGRunner(copy.deepcopy(mlp()), ["cpu"])
    with pytest.raises(ValueError, match="param_groups="):
        runner.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="closure"):
        runner.optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("momentum", -0.1), ("weight_decay", float("nan"))]
)
def test_hyper_parameters_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        FDGRunner(mlp(), ["cpu"], **{name: value})
    with pytest.raises(ValueError, match="nesterov"):
        FDGRunner(mlp(), ["cpu"], nesterov=True, momentum=0.0)


def plateau(runner: FDGRunner) -> object:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(runner.optimizer)


def of_another(_: FDGRunner) -> object:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return StepLR(other, 1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda _: "cos", TypeError, "runner.optimizer; got a str"),
        (lambda _: StepLR, TypeError, r"lr_scheduler=StepLR\(runner.optimizer, ...\)"),
        (plateau, TypeError, "on_epoch.* callback"),
        (of_another, ValueError, "another optimizer"),
    ],
    ids=["no scheduler", "a class", "wants a metric", "another optimizer"],
)
def test_schedulers_that_would_not_work(
    make: Callable[[FDGRunner], object], error: type[Exception], words: str
) -> None:
    """Said before the first batch, not after the first epoch."""
    runner = FDGRunner(mlp(), ["cpu"])
    with pytest.raises(error, match=words):
        runner.fit(batches(3), lr_scheduler=make(runner))
    assert runner.history is None


def one_cycle_of(runner: FDGRunner, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(runner.optimizer, 0.1, total_steps=total_steps)


def test_a_cycle_too_short_for_the_fit_is_told_before_it_begins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner, data = FDGRunner(mlp(), ["cpu"]), batches(3)
    with pytest.raises(ValueError, match="Tried to step"):  # torch's
        runner.fit(data, 2, lr_scheduler=one_cycle_of(runner, 5), lr_step="batch")
    words = "has 5 steps left and raises an error behind them, but this fit will step it 6 times"
    assert [words in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    scheduler = one_cycle_of(runner, 6)
    runner.fit(data, 1, lr_scheduler=scheduler, lr_step="batch")
    runner.fit(data, 3, lr_scheduler=scheduler, lr_step="epoch")
    runner.fit([], 0, lr_scheduler=scheduler, lr_step="batch")
    assert not caplog.records
    with pytest.raises(ValueError, match="Tried to step"):
        runner.fit(iter(data), 1, lr_scheduler=scheduler, lr_step="batch")
    assert not caplog.records, "no length is known"


class Shy(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("not for you")


def test_a_loader_that_keeps_its_length_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    runner = FDGRunner(mlp(), ["cpu"])
    runner.fit(Shy(batches(3)))
    runner.fit(Shy(batches(3)), lr_scheduler=one_cycle_of(runner, 3), lr_step="batch")
    assert not caplog.records


@pytest.mark.parametrize("every", [None, 2])
def test_a_cycle_is_as_long_as_what_is_left_behind_a_checkpoint(
    every: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = batches(3)

    def fit(stop_at: int) -> int:
        runner = FDGRunner(mlp(), ["cpu"])
        scheduler = one_cycle_of(runner, 6)

        def on_batch(result: BatchResult) -> None:
            if result.batch + 1 == stop_at:
                runner.stop()

        runner.fit(
            data,
            2,
            lr_scheduler=scheduler,
            lr_step="batch",
            on_batch=on_batch,
            checkpoints=Checkpoints(tmp_path, every=every, resume=True),
        )
        return int(scheduler.last_epoch)

    assert 0 < fit(stop_at=1 if every else 3) < 6
    assert fit(stop_at=0) == 6
    assert not [record for record in caplog.records if "OneCycleLR" in record.getMessage()]
