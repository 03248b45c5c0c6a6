"""Breaks at awkward moments, and what they must not cost: the best checkpoint, bits, time, memory."""

from __future__ import annotations

import errno
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, Batch, batches, even_split, mlp, same_bits
from crashes import Crash, CrashError
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from fdg_cuda import (
    Callback,
    CheckpointError,
    Checkpoints,
    EpochResult,
    FDGRunner,
    FitStart,
    History,
    TrainingStopped,
    checkpoint,
)
from fdg_cuda.checkpoint import CheckpointFolder
from fdg_cuda.checkpoint_file import Checkpoint

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left", "python_handlers")

SAMPLES = 24
X = torch.arange(SAMPLES * FEATURES, dtype=torch.float64).sin().view(SAMPLES, FEATURES)
DATA = TensorDataset(X, torch.arange(SAMPLES) % CLASSES)
BATCHES = 6


@pytest.fixture
def python_handlers() -> Iterator[None]:
    """Python's own handlers, whatever the test run was started under."""
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def runner_of(stages: int = 2, **options: Any) -> FDGRunner:
    model = mlp()
    return FDGRunner(
        model, ["cpu"] * stages, split=even_split(len(model), stages), lr=0.05, **options
    )


def a_run(
    folder: Path,
    make_loader: Callable[[], Any],
    *,
    epochs: int = 4,
    crash: int = 10**6,
    callback: Callable[[FDGRunner, Any], Callback] = lambda runner, loader: Callback(),
    runner: FDGRunner | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """What a script does from its first line on; the weights at its end."""
    torch.manual_seed(3)
    runner, loader = runner or runner_of(), make_loader()
    runner.fit(
        loader,
        epochs,
        callbacks=[callback(runner, loader), Crash(crash)],
        checkpoints=Checkpoints(folder, **options),
    )
    return runner.state_dict()


# -- a stop before an epoch's first batch ---------------------------------------------------------


class Stopping(DataLoader[Any]):
    """The signal comes while the iterator of epoch ``at`` is made."""

    def __init__(self, at: int) -> None:
        super().__init__(DATA, batch_size=4, shuffle=True)
        self.left = at

    def __iter__(self) -> Any:
        self.left -= 1
        iterator = super().__iter__()
        if self.left == -1:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterator


@pytest.mark.parametrize("at", [0, 2])
def test_a_stop_before_an_epochs_first_batch_leaves_no_trace(tmp_path: Path, at: int) -> None:
    def metric(result: EpochResult) -> float:
        return -abs(result.epoch - 1)  # the best: behind 12 batches

    def train(folder: Path, stop: int, **options: Any) -> dict[str, Tensor]:
        return a_run(folder, lambda: Stopping(stop), keep=1, metric=metric, **options)

    expected = train(tmp_path / "unbroken", -1)
    run = tmp_path / "run"
    with pytest.raises(TrainingStopped) as stopped:
        train(run, at)
    assert (stopped.value.epoch, stopped.value.batch) == (at, 0)
    assert stopped.value.checkpoint == run / f"checkpoint-{at * BATCHES:09}.safetensors"
    assert stopped.value.checkpoint.exists()
    assert CheckpointFolder(run).best() == (stopped.value.checkpoint if at else None)
    assert same_bits(train(run, -1, resume=True), expected)
    assert CheckpointFolder(run).best() == run / "checkpoint-000000012.safetensors"


def test_a_stop_while_trained_batches_are_passed_over(tmp_path: Path) -> None:
    class Signal(DataLoader[Any]):
        left = 10**6

        def __iter__(self) -> Any:
            for batch in super().__iter__():
                self.left -= 1
                if self.left == -1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    def loader(after: int = 10**6) -> Callable[[], DataLoader[Any]]:
        made = Signal(DATA, batch_size=4, shuffle=True)
        made.left = after
        return lambda: made

    expected = a_run(tmp_path / "unbroken", loader(), every=5, epochs=2)
    run = tmp_path / "run"
    with pytest.raises(CrashError):
        a_run(run, loader(), every=5, epochs=2, crash=5)
    (newest,) = run.iterdir()
    before = newest.read_bytes()
    with pytest.raises(TrainingStopped, match="before batch 5 of epoch 0") as stopped:
        a_run(run, loader(2), every=5, epochs=2, resume=True)
    assert stopped.value.checkpoint == newest
    assert newest.read_bytes() == before
    assert same_bits(a_run(run, loader(), every=5, epochs=2, resume=True), expected)


def test_a_signal_behind_the_last_batch_stops_nothing(tmp_path: Path) -> None:
    class Late(Callback):
        ended = False

        def on_epoch_end(self, result: EpochResult) -> None:
            if result.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_fit_end(self, history: History) -> None:
            self.ended = True

    late = Late()
    history = runner_of().fit(batches(3), 2, callbacks=[late], checkpoints=tmp_path)
    assert len(history.epochs) == 2
    assert late.ended


# -- the order of the data --------------------------------------------------------------------------


class Numbered(Sampler[int]):
    """Its order depends on a number that somebody tells it."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(SAMPLES, generator=generator).tolist())

    def __len__(self) -> int:
        return SAMPLES


class SetEpoch(Callback):
    def __init__(self, runner: FDGRunner, loader: Any) -> None:
        self.loader = loader

    def on_epoch_start(self, epoch: int) -> None:
        self.loader.sampler.epoch = epoch


class WithTensors:
    """A loader whose state is that of its generator, a tensor in a dictionary in a list."""

    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(SAMPLES, generator=self.own)
        return iter([DATA[part] for part in order.split(4)])

    def state_dict(self) -> dict[str, Any]:
        return {"all": [{"own": self.own.get_state()}], "one": torch.ones(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["one"].shape == (1,)
        self.own.set_state(state["all"][0]["own"])


def with_generator() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


def with_sampler() -> DataLoader[Any]:
    sampler = torch.utils.data.RandomSampler(DATA, generator=torch.Generator().manual_seed(5))
    return DataLoader(DATA, batch_sampler=torch.utils.data.BatchSampler(sampler, 4, False))


def shuffled() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, shuffle=True)


class Evaluates(Callback):
    """Which draws a number for the workers of a ``DataLoader``, though it has none."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def __call__(self, runner: FDGRunner, loader: Any) -> Callback:
        setattr(self, self.moment, lambda *_: runner.evaluate(loader))
        return self


@pytest.mark.parametrize(
    ("make_loader", "callback"),
    [
        (with_generator, None),
        (with_sampler, None),
        (WithTensors, None),
        (lambda: DataLoader(DATA, batch_size=4, sampler=Numbered()), SetEpoch),
        (shuffled, Evaluates("on_fit_start")),
        (shuffled, Evaluates("on_checkpoint")),
        (shuffled, Evaluates("on_epoch_start")),
        (with_generator, Evaluates("on_checkpoint")),
    ],
)
@pytest.mark.parametrize("crash", [8, 11])
def test_the_order_of_the_data_goes_on(
    tmp_path: Path, make_loader: Callable[[], Any], callback: Any, crash: int
) -> None:
    options = {"every": 4} | ({} if callback is None else {"callback": callback})
    expected = a_run(tmp_path / "unbroken", make_loader, **options)
    with pytest.raises(CrashError):
        a_run(tmp_path / "run", make_loader, crash=crash, **options)
    assert same_bits(a_run(tmp_path / "run", make_loader, resume=True, **options), expected)


def test_a_callback_may_draw_before_the_first_epoch_of_a_measured_split(tmp_path: Path) -> None:
    """Whose iterator is made before all else then, and behind the callback when it goes on."""

    def train(name: str, crash: int = 10**6, **options: Any) -> dict[str, Tensor]:
        runner = FDGRunner(mlp(layers=2), ["cpu", "cpu"], lr=0.05)  # of which there is one cut
        evaluates = Evaluates("on_epoch_start")
        return a_run(
            tmp_path / name,
            shuffled,
            runner=runner,
            crash=crash,
            every=4,
            callback=evaluates,
            **options,
        )

    expected = train("unbroken")
    with pytest.raises(CrashError):
        train("run", crash=5)
    assert same_bits(train("run", resume=True), expected)


def test_another_loaders_generator_is_missed(tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        a_run(tmp_path, with_generator, crash=8)
    with pytest.raises(RuntimeError, match=r"of its own at: generator; .* at: none"):
        a_run(tmp_path, shuffled, resume=True)


def test_a_scheduler_in_a_callback_goes_on(tmp_path: Path) -> None:
    """As the guide to checkpoints does it."""

    class Plateau(Callback):
        def __init__(self, runner: FDGRunner, loader: Any) -> None:
            make = torch.optim.lr_scheduler.ReduceLROnPlateau
            self.scheduler = make(runner.optimizer, patience=0, threshold=0.9)

        def on_epoch_end(self, result: EpochResult) -> None:
            self.scheduler.step(result.loss)

        def state_dict(self) -> dict[str, Any]:
            return self.scheduler.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.scheduler.load_state_dict(state)

    expected = a_run(tmp_path / "unbroken", shuffled, callback=Plateau)
    with pytest.raises(CrashError):
        a_run(tmp_path / "run", shuffled, callback=Plateau, crash=14)
    assert same_bits(a_run(tmp_path / "run", shuffled, callback=Plateau, resume=True), expected)


# -- what is kept, and what is not ------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_old_checkpoints_stay_until_the_new_run_works(tmp_path: Path, overwrite: bool) -> None:
    runner_of().fit(batches(3), checkpoints=tmp_path)
    checkpoints = Checkpoints(tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="yields no batch"):
        runner_of().fit([], checkpoints=checkpoints)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000003.safetensors"]
    with pytest.raises(CrashError):
        runner_of().fit(batches(3), callbacks=[Crash(0)], checkpoints=checkpoints)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_before_the_first_batch(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "checkpoints"):
        runner = runner_of()
        with pytest.raises(CheckpointError, match=r"no checkpoints can be written into .*file"):
            runner.fit(batches(3), checkpoints=folder)
        assert runner.history is not None
        assert not runner.history.batch_losses


def test_a_full_disk_is_no_reason_not_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "TemporaryFile", full)
    runner_of().fit(batches(3), checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000003.safetensors"]


def test_what_a_metric_raises_comes_out(tmp_path: Path) -> None:
    def metric(result: EpochResult) -> float:
        raise FileNotFoundError("of the metric")

    with pytest.raises(FileNotFoundError, match="of the metric"):
        runner_of().fit(batches(3), 2, checkpoints=Checkpoints(tmp_path, metric=metric))


def test_a_checkpoint_gone_on_from_is_not_held(tmp_path: Path) -> None:
    class Held(Callback):
        def on_epoch_end(self, result: EpochResult) -> None:
            gc.collect()  # what tests before this one left in cycles
            kinds = [type(each) for each in gc.get_objects()]
            assert Checkpoint not in kinds

    for epochs in (1, 2):
        runner_of().fit(
            batches(3), epochs, callbacks=[Held()], checkpoints=Checkpoints(tmp_path, resume=True)
        )


def test_the_wait_for_first_batches_counts(tmp_path: Path) -> None:
    """Of an epoch, and of a part of one between two drains."""

    class Slow:
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(batches(4)):
                if number % 2 == 0:
                    time.sleep(0.1)
                yield batch

    history = runner_of().fit(Slow(), 2, checkpoints=Checkpoints(tmp_path, every=2))
    for epoch in history.epochs:
        assert 0.2 <= epoch.data_seconds <= epoch.seconds


def test_a_callback_that_raises_leaves_ctrl_c_on_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one could interrupt the closing of the pipeline half-way."""
    from fdg_cuda.interrupts import Interrupts
    from fdg_cuda.pipeline import Pipeline

    class Bad(Callback):
        def on_fit_start(self, start: FitStart) -> None:
            raise LookupError

    allowed: list[bool] = []
    made: list[Interrupts] = []
    enter, close = Interrupts.__enter__, Pipeline.close

    def noting_enter(self: Interrupts) -> Interrupts:
        made.append(self)
        return enter(self)

    def noting_close(self: Pipeline) -> None:
        allowed.append(made[-1]._allowed)
        close(self)

    monkeypatch.setattr(Interrupts, "__enter__", noting_enter)
    monkeypatch.setattr(Pipeline, "close", noting_close)
    with pytest.raises(LookupError):
        runner_of().fit(batches(3), callbacks=[Bad()])
    assert allowed == [False]
