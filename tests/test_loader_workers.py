"""Batches made by worker processes: the same bits, in order, and no process that stays too long."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import same_bits
from leftovers import children, nothing_left
from test_data import numbered
from torch import Tensor, nn

from fdg_cuda import Callback, Checkpoints, FDGRunner, LoaderWorkerError
from fdg_cuda.data import BatchLoader

# Python 3.12 warns of every fork of a process with threads.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "no_thread_left"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

SAMPLES, SIZE = 50, 8
BATCHES = 7


@pytest.fixture(autouse=True)
def no_process_left(one_torch_thread: None, no_thread_left: Callable[[], None]) -> Iterator[None]:
    """Looked at before the threads, since it lets exceptions go that keep some."""
    with nothing_left():
        yield


def make(workers: int = 2, **options: Any) -> BatchLoader:
    dataset = numbered(SAMPLES, augment=True)
    return BatchLoader(dataset, SIZE, shuffle=True, seed=3, workers=workers, **options)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(a, b, strict=True)
    )


def die(where: str) -> None:
    """Kill the processes that make batches."""
    assert children(), where
    for child in children():
        os.kill(child, signal.SIGKILL)


# -- what they give ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(workers: int) -> None:
    plain = make(0)
    with make(workers) as loader:
        for _ in range(3):
            assert same(list(loader), list(plain))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_can_begin_anywhere(workers: int) -> None:
    plain = make(0)
    with make(workers) as loader:
        for first in (3, BATCHES - 1, BATCHES, 0):
            assert same(list(loader.iter_from(first)), list(plain)[first:])
        assert loader.epoch == plain.epoch
        with pytest.raises(ValueError, match="an epoch has 7 batches; it cannot begin behind 8"):
            loader.iter_from(8)


def test_batches_passed_over_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make(0)
    made: list[int] = []
    batch = type(loader.dataset).batch
    monkeypatch.setattr(
        type(loader.dataset),
        "batch",
        lambda self, index, generator: made.append(1) or batch(self, index, generator),
    )
    assert len(list(loader.iter_from(5))) == len(made) == 2


def test_no_batch_draws_what_another_draws() -> None:
    """Batches of one image each, which differ by nothing but their augmentation and their number."""
    dataset = numbered(1, augment=True, size=32)
    dataset.images = dataset.images.expand(64, -1, -1, -1)
    dataset.labels = dataset.labels.expand(64)
    loader = BatchLoader(dataset, 4)
    seen = {x.numpy().tobytes() for _ in range(4) for x, _ in loader}
    assert len(seen) == 4 * 16


def test_layout_survives_the_way() -> None:
    with make(1, channels_last=True) as loader:
        for x, _ in loader:
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_two_passes_at_once_have_workers_of_their_own() -> None:
    plain = make(0)
    expected = list(plain), list(plain)
    with make(1) as loader:
        pairs = list(zip(loader, loader, strict=True))
        assert same([a for a, _ in pairs], expected[0])
        assert same([b for _, b in pairs], expected[1])


def test_torch_s_own_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    with make() as loader:
        list(loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_batches_can_go_to_processes_that_are_not_forked() -> None:
    plain = make(0)
    copied = pickle.loads(pickle.dumps(plain._batches))
    assert same([copied[0, 4]], [list(plain)[4]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        (
            {"workers": 0, "pin_memory": True},
            "pin_memory is done beside the workers, and there are",
        ),
    ],
)
def test_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**options)


# -- how long they stay -----------------------------------------------------------------------------


def test_workers_stay_from_pass_to_pass_until_closed() -> None:
    loader = make()
    assert not children()
    list(loader)
    first = children()
    assert len(first) == 2
    list(loader)
    assert children() == first
    loader.close()
    assert not children()
    list(loader)
    assert len(children()) == 2, "they are started anew"
    del loader
    assert not children()


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_an_abandoned_pass_ends_its_workers(how: str) -> None:
    loader = make()
    batches = iter(loader)
    next(batches)
    assert len(children()) == 2
    if how == "close":
        batches.close()  # type: ignore[attr-defined]
    elif how == "drop":
        del batches
    else:
        with pytest.raises(KeyError), contextlib.closing(batches):
            raise KeyError
    assert not children()
    loader.epoch = 0
    assert same(list(loader), list(make(0)))


def test_ctrl_c_is_left_to_the_one_that_trains() -> None:
    with make() as loader:
        batches = iter(loader)
        read = [next(batches)]
        for child in children():
            os.kill(child, signal.SIGINT)
        time.sleep(0.05)
        assert same([*read, *batches], list(make(0)))


# -- training ---------------------------------------------------------------------------------------


def runner_of(stages: int) -> FDGRunner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, SAMPLES))
    return FDGRunner(model, ["cpu"] * stages, split=[2][: stages - 1], lr=1e-4)


def trained(stages: int, loader: BatchLoader, **options: Any) -> dict[str, Tensor]:
    runner = runner_of(stages)
    losses = runner.fit(loader, 3, **options).batch_losses
    assert len(losses) == 3 * BATCHES
    return {**runner.state_dict(), "losses": torch.tensor(losses)}


class Kills(Callback):
    """Kills the workers behind the batch of that number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_batch_end(self, result: object) -> None:
        self.left -= 1
        if self.left == 0:
            die("on_batch_end")


@pytest.mark.parametrize("stages", [1, 2])
def test_training_goes_on_behind_a_death_to_the_same_bits(tmp_path: Path, stages: int) -> None:
    """With workers or without before the break and behind it."""
    expected = trained(stages, make(0), checkpoints=Checkpoints(tmp_path / "unbroken", every=3))
    checkpoints = Checkpoints(tmp_path / "run", every=3)
    with make() as loader, pytest.raises(LoaderWorkerError, match=r"batch \d of epoch [12] was"):
        runner_of(stages).fit(loader, 3, callbacks=[Kills(11)], checkpoints=checkpoints)
    for workers in (2, 0):
        resumed = Checkpoints(tmp_path / "run", every=3, resume=True)
        with make(workers) as loader:
            ended = trained(stages, loader, callbacks=[Kills(-1)], checkpoints=resumed)
        assert same_bits(ended, expected)
        (tmp_path / "run" / "checkpoint-000000021.safetensors").unlink()


@pytest.mark.parametrize("stages", [1, 2])
def test_the_loader_can_be_used_again_behind_a_death(stages: int) -> None:
    loader = make()
    runner = runner_of(stages)
    with pytest.raises(LoaderWorkerError):
        runner.fit(loader, 2, callbacks=[Kills(3)])
    assert not children(), "although the exception is still known"
    assert len(runner.fit(loader, 2).batch_losses) == 2 * BATCHES
    loader.close()


def test_workers_that_die_between_two_epochs_are_replaced() -> None:
    loader = make()
    expected = make(0)
    assert same(list(loader), list(expected))
    team = loader._idle[0]
    with contextlib.suppress(RuntimeError):  # torch says so on the spot, since this is no fit
        die("between")
        while team.whole:
            time.sleep(0.01)
    assert same(list(loader), list(expected))
    loader.close()


def test_an_exception_of_the_data_set_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make()
    batch, calls = type(loader.dataset).batch, []

    def bad(self: Any, index: Tensor, generator: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # of this worker; they take turns, so it is batch 2 or 3
            raise LookupError("image 17 is broken")
        return batch(self, index, generator)

    monkeypatch.setattr(type(loader.dataset), "batch", bad)
    runner = runner_of(2)
    with pytest.raises(LookupError, match="image 17 is broken") as caught:
        runner.fit(loader)
    assert "(in the loader, at batch 2 of epoch 0)" in getattr(
        caught.value, "__notes__", ["(in the loader, at batch 2 of epoch 0)"]
    )
    monkeypatch.undo()
    assert not children()
    assert len(runner.fit(loader).batch_losses) == BATCHES
    loader.close()
