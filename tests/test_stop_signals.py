"""With checkpoints, SIGTERM and Ctrl-C stop training at a point from which it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import batches, even_split, largest_difference, mlp, oracle

from fdg_cuda import BatchResult, Callback, Checkpoints, FDGRunner, History, TrainingStopped

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left")

BATCHES = 20
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def python_handlers() -> Iterator[None]:
    """Python's own handlers, whatever the test run was started under, and put back by every fit."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


class Signals(Callback):
    """Sends signals to this process behind batches of the first epoch."""

    def __init__(self, at: dict[int, signal.Signals]) -> None:
        self.at = at

    def on_batch_end(self, result: BatchResult) -> None:
        if result.epoch == 0 and result.batch in self.at:
            os.kill(os.getpid(), self.at[result.batch])


def fit(folder: Path, at: dict[int, signal.Signals], stages: int = 2, **options: Any) -> Any:
    model = mlp()
    runner = FDGRunner(model, ["cpu"] * stages, split=even_split(len(model), stages), lr=0.05)
    checkpoints = Checkpoints(folder, **options)
    history = runner.fit(
        batches(BATCHES, last=None), 2, callbacks=[Signals(at)], checkpoints=checkpoints
    )
    return runner, history


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("number", SIGNALS)
def test_training_goes_on_where_it_was_stopped(
    tmp_path: Path, number: signal.Signals, stages: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The drain leaves its trace in the arithmetic: the epoch is one of two parts then."""
    with pytest.raises(TrainingStopped) as stopped:
        fit(tmp_path, {4: number}, stages)
    trained = stopped.value.batch
    assert stopped.value.signal == number.name
    assert stopped.value.epoch == 0
    assert 5 <= trained < 15
    assert stopped.value.checkpoint == tmp_path / f"checkpoint-{trained:09}.safetensors"
    assert f"Checkpoints({str(tmp_path)!r}, resume=True)" in str(stopped.value)
    assert f"{number.name}: what is under way is finished" in caplog.text
    runner, history = fit(tmp_path, {}, stages, resume=True)
    assert [epoch.batches for epoch in history.epochs] == [BATCHES, BATCHES]

    # The oracle drains at the end of an epoch only; so it is made of three.
    data = batches(BATCHES, last=None)
    expected = oracle_in_parts([data[:trained], data[trained:], data], stages)
    assert largest_difference(runner.state_dict(), expected) < 1e-10
    assert isinstance(history, History)


def oracle_in_parts(parts: list[Any], stages: int) -> dict[str, Any]:
    """Without momentum carried by a file: one call of the runner itself without any signal."""
    model = mlp()
    runner = FDGRunner(model, ["cpu"] * stages, split=even_split(len(model), stages), lr=0.05)
    first, _ = oracle(mlp(), runner.split or [], parts[0], lr=0.05)
    runner.fit(parts[0])
    assert largest_difference(runner.state_dict(), first) < 1e-10
    for part in parts[1:]:
        runner.fit(part)
    return runner.state_dict()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(tmp_path, {4: signal.SIGINT, 5: signal.SIGINT})
    assert not isinstance(stopped.value, TrainingStopped)
    assert list(tmp_path.glob("checkpoint-*")) == []
    _, history = fit(tmp_path, {}, resume=True)
    assert len(history.epochs) == 2


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_stop_signals
from pathlib import Path
test_stop_signals.fit(Path(sys.argv[1]), {{4: signal.SIGTERM, 5: signal.SIGTERM}})
"""


def test_a_second_sigterm_ends_the_process(tmp_path: Path) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGTERM


def test_without_checkpoints_signals_do_what_they_always_did() -> None:
    seen = []
    runner = FDGRunner(mlp(), ["cpu"])
    runner.fit(batches(3), on_batch=lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    assert set(seen) == {signal.SIG_DFL}


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _, history = fit(tmp_path, {4: signal.SIGTERM})
    finally:
        assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_IGN
    assert len(history.epochs) == 2


def test_in_another_thread_stop_does_it(tmp_path: Path) -> None:
    runner = FDGRunner(mlp(), ["cpu"])
    histories: list[History] = []

    def train() -> None:
        histories.append(
            runner.fit(
                batches(200),
                on_batch=lambda r: r.batch == 3 and runner.stop(),
                checkpoints=tmp_path,
            )
        )

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    trained = len(histories[0].batch_losses)
    assert trained < 20
    assert [file.name for file in tmp_path.iterdir()] == [f"checkpoint-{trained:09}.safetensors"]
