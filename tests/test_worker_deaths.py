"""Workers of a user's own torch DataLoader that die or raise, and signals that reach them too."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, even_split, mlp, same_bits
from commands import MLP, start
from leftovers import children, nothing_left
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdg_cuda import Callback, Checkpoints, FDGRunner, LoaderWorkerError
from fdg_cuda.errors import is_death_of_worker

# Python 3.12 warns of every fork of a process with threads.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "no_thread_left"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

SIZE, BATCHES, EPOCHS = 4, 6, 3
SAMPLES = SIZE * BATCHES


class Samples(Dataset[tuple[Tensor, int]]):
    """``trouble`` is called with the number of each sample, in the process that makes it."""

    def __init__(self, trouble: Callable[[int], object] = lambda index: None) -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.trouble(index)
        x = torch.full((FEATURES,), float(index), dtype=torch.float64).sin()
        return x, index % CLASSES


def loader_of(trouble: Callable[[int], object] = lambda index: None) -> DataLoader[Any]:
    return DataLoader(Samples(trouble), batch_size=SIZE, num_workers=2)


def runner_of(stages: int) -> FDGRunner:
    model = mlp()
    split = even_split(len(model), stages)
    return FDGRunner(model, ["cpu"] * stages, split=split, lr=0.05)


def exits(index: int) -> None:
    if index == 4 * SIZE:
        os._exit(7)


def is_killed(index: int) -> None:
    if index == 4 * SIZE:
        os.kill(os.getpid(), signal.SIGKILL)


def raises(index: int) -> None:
    if index == 4 * SIZE:
        raise LookupError("sample 16 is broken")


@pytest.fixture(autouse=True)
def no_process_left(one_torch_thread: None, no_thread_left: Callable[[], None]) -> Iterator[None]:
    """Looked at before the threads, since it lets exceptions go that keep some."""
    with nothing_left():
        yield


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("trouble", [exits, is_killed])
def test_a_dead_worker_is_said_in_plain_words(
    trouble: Callable[[int], object], stages: int, no_thread_left: Callable[[], None]
) -> None:
    runner = runner_of(stages)
    with nothing_left():
        with pytest.raises(LoaderWorkerError) as caught:
            runner.fit(loader_of(trouble))
        assert caught.value.epoch == 0
        assert 0 <= caught.value.batch <= 4
        said = str(caught.value)
        assert said.startswith("a worker process of the loader died; batch ")
        assert f"batch {caught.value.batch} of epoch 0 was to be read next (torch said: " in said
        assert "num_workers=0" in said
        assert "resume=True" in said
        assert isinstance(caught.value.__cause__, (RuntimeError, OSError, EOFError))
        assert not children(), "although the exception is still known"
        del caught
    no_thread_left()
    assert len(runner.fit(loader_of()).batch_losses) == BATCHES


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("trouble", [is_killed, raises])
def test_training_goes_on_from_the_last_checkpoint(
    tmp_path: Path, trouble: Callable[[int], object], stages: int
) -> None:
    def train(name: str, trouble: Callable[[int], object], **options: Any) -> dict[str, Tensor]:
        runner = runner_of(stages)
        torch.manual_seed(0)
        checkpoints = Checkpoints(tmp_path / name, every=2, **options)
        history = runner.fit(loader_of(trouble), EPOCHS, checkpoints=checkpoints)
        assert len(history.batch_losses) == EPOCHS * BATCHES
        return {**runner.state_dict(), "losses": torch.tensor(history.batch_losses)}

    expected = train("unbroken", lambda index: None)
    with pytest.raises((LoaderWorkerError, LookupError)):
        train("run", trouble)
    # A death may be known before the batches that were made before it are trained.
    kept = {path.name for path in tmp_path.glob("run/*")}
    assert kept <= {f"checkpoint-{n:09}.safetensors" for n in (2, 4)}
    assert same_bits(train("run", lambda index: None, resume=True), expected)


@pytest.mark.parametrize("stages", [1, 2])
def test_what_a_data_set_raises_comes_out_with_its_place(stages: int) -> None:
    runner = runner_of(stages)
    with pytest.raises(LookupError, match="sample 16 is broken") as caught:
        runner.fit(loader_of(raises))
    assert "in raises" in str(caught.value), "torch adds the worker's traceback"
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["(in the loader, at batch 4 of epoch 0)"]
    assert not children(), "although the exception is still known"
    assert len(runner.fit(loader_of()).batch_losses) == BATCHES


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, FileNotFoundError])
def test_what_a_data_set_raises_is_no_death(error: type[Exception]) -> None:
    """Although torch itself meets these where a worker died."""

    def trouble(index: int) -> None:
        if index == SIZE:
            raise error("of the data set")

    with pytest.raises(error, match="of the data set") as caught:
        runner_of(2).fit(loader_of(trouble))
    assert not is_death_of_worker(caught.value)


class Kills(Callback):
    """Kills the workers at a moment of which no error may come out half-way."""

    def on_epoch_start(self, epoch: int) -> None:
        if epoch == 1:
            for child in children():
                os.kill(child, signal.SIGKILL)
            while any(Path(f"/proc/{child}/exe").exists() for child in children()):
                time.sleep(0.005)


def test_workers_that_stay_and_die_between_epochs() -> None:
    loader = DataLoader(Samples(), batch_size=SIZE, num_workers=2, persistent_workers=True)
    runner = runner_of(2)
    with pytest.raises(LoaderWorkerError, match="batch 0 of epoch 1 was to be read next"):
        runner.fit(loader, 3, callbacks=[Kills()])
    assert len(runner.fit(loader_of()).batch_losses) == BATCHES


class Signals(Callback):
    """As a service manager stops a service: all of its processes at the same time."""

    def __init__(self, *, epoch: int) -> None:
        self.epoch = epoch

    def on_batch_end(self, result: Any) -> None:
        if (result.epoch, result.batch) == (self.epoch, 0):
            os.kill(os.getpid(), signal.SIGTERM)
            for child in children():
                os.kill(child, signal.SIGTERM)


def test_a_signal_that_ends_the_workers_too_stops_at_a_checkpoint(tmp_path: Path) -> None:
    runner = runner_of(2)
    loader = DataLoader(Samples(), batch_size=2, num_workers=2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        runner.fit(loader, EPOCHS, callbacks=[Signals(epoch=0)], checkpoints=tmp_path)
    assert stopped.value.signal == "SIGTERM"  # type: ignore[attr-defined]
    assert stopped.value.checkpoint is not None  # type: ignore[attr-defined]
    resumed = Checkpoints(tmp_path, resume=True)
    history = runner_of(2).fit(loader, EPOCHS, callbacks=[Signals(epoch=-1)], checkpoints=resumed)
    assert len(history.batch_losses) == EPOCHS * SAMPLES // 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_the_command_with_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As Ctrl-C in a terminal, or `timeout` and a service manager: the workers get it too."""
    command = f"{MLP} --epochs 300 --workers 2 --checkpoint-every 5 --out run"
    process = start(command, tmp_path, own_group=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    give_up = time.monotonic() + 60
    while not (checkpoints.is_dir() and any(checkpoints.glob("checkpoint-*.safetensors"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"{number.name}: stopped before batch" in errors
    assert "--resume" in errors
    with pytest.raises(ProcessLookupError):  # nobody is left in the group
        os.killpg(process.pid, 0)
