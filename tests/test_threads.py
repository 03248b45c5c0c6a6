"""Intra-op threads, and the defaults of a runner."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from chains import batches, largest_difference, mlp, oracle, same_bits
from in_thread import in_thread
from torch import Tensor, nn
from torch.nn import functional as F
from traps import Scene, TroubleError
from versions import (
    TOLERANCE,
    parameters,
    runner_of,
    state,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("stages", [1, 2])
def test_fit_in_another_thread(stages: int) -> None:
    model, twin = mlp(), mlp()
    runner_of(twin, stages).fit(batches(5))
    in_thread(lambda: runner_of(model, stages).fit(batches(5)) and None).join()
    assert same_bits(state(model), state(twin))


def test_exception_in_another_thread() -> None:
    scene = Scene()
    scene.set("backward 1", 3)
    caught: list[BaseException] = []

    def train() -> None:
        try:
            scene.runner().fit(scene.loader)
        except TroubleError as error:
            caught.append(error)

    in_thread(train).join()
    assert len(caught) == 1


@pytest.mark.usefixtures("four_torch_threads")
def test_fits_at_the_same_time_give_the_same_bits_as_alone() -> None:
    models = [(seed, stages) for seed in (1, 2) for stages in (1, 2, 3)]
    alone, together = ([mlp(seed) for seed, _ in models] for _ in range(2))

    def train(model: nn.Sequential, stages: int) -> None:
        runner_of(model, stages).fit(batches(8), epochs=3)

    for model, (_, stages) in zip(alone, models, strict=True):
        train(model, stages)
    threads = [
        in_thread(lambda model=model, stages=stages: train(model, stages))  # type: ignore[misc]
        for model, (_, stages) in zip(together, models, strict=True)
    ]
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert same_bits(state(a), state(b))


class Look(nn.Module):
    """Notes how many threads torch gives its stage; may wait for another runner meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self, x: Tensor) -> Tensor:
        self.threads.add(torch.get_num_threads())
        self.entered.set()
        assert self.go_on.wait(10)
        return x


@pytest.mark.usefixtures("four_torch_threads")
def test_thread_counts_of_torch() -> None:
    """Each stage has its share; the caller, and threads started later, keep theirs."""
    for stages, share in ((1, 4), (2, 2), (3, 1)):
        look = Look()
        runner_of(nn.Sequential(look, *mlp(layers=5)), stages).fit(batches(3))
        assert look.threads == {share}
        assert torch.get_num_threads() == 4
    later: list[int] = []
    in_thread(lambda: later.append(torch.get_num_threads())).join()
    assert later == [4]


@pytest.mark.usefixtures("four_torch_threads")
def test_thread_counts_of_a_fit_that_starts_during_another() -> None:
    """Its share must be what it is alone, or it sums in another order and gives other bits."""
    first, second = Look(), Look()
    first.go_on.clear()

    def train(look: Look) -> None:
        runner_of(nn.Sequential(look, *mlp(layers=5)), 2).fit(batches(3))

    one = in_thread(lambda: train(first))
    assert first.entered.wait(10)
    in_thread(lambda: train(second)).join()
    first.go_on.set()
    one.join()
    later: list[int] = []
    in_thread(lambda: later.append(torch.get_num_threads())).join()
    assert (first.threads, second.threads, later) == ({2}, {2}, [4])


@pytest.mark.parametrize("split", [[3], None], ids=["given-split", "measured-split"])
def test_default_dtype_float64(split: list[int] | None) -> None:
    """Layers and targets made under it, losses in it: one-hot regression against the oracle."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 4),
        )
        data = [(x, F.one_hot(y, 4).to(torch.get_default_dtype())) for x, y in batches(6)]
        runner = runner_of(copy.deepcopy(model), split=split, loss_fn=F.mse_loss)
        history = runner.fit(data)
        assert runner.split is not None
        expected, recorded = oracle(model, runner.split, data, lr=0.05, loss_fn=F.mse_loss)
        assert largest_difference(runner.state_dict(), expected) < TOLERANCE
        assert history.batch_losses == pytest.approx(recorded.losses, rel=TOLERANCE)
        assert history.epochs[0].accuracy is None
        assert runner.evaluate(data).accuracy is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_dtype_float64_does_not_spread_to_float32_models() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = mlp().float()
        runner_of(model).fit([(x.float(), y) for x, y in batches(4)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in parameters(model)} == {torch.float32}


def test_fit_within_no_grad() -> None:
    model, twin = mlp(), mlp()
    with torch.no_grad():
        runner_of(model).fit(batches(4))
    runner_of(twin).fit(batches(4))
    assert same_bits(state(model), state(twin))
