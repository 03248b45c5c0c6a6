"""Ctrl-C stops within two ticks, with whole weights and no thread left."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from chains import Batch, batches, even_split, largest_difference, mlp, oracle
from in_thread import in_thread
from leftovers import nothing_left
from torch import Tensor, nn
from versions import (
    LAYERS,
    TOLERANCE,
    check_versions,
    parameters,
    runner_of,
    state,
    versions,
)

import fdg_cuda
from fdg_cuda.interrupts import Interrupts

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


class Slow(nn.Module):
    """Takes a while, so that ticks are longer than the reaction to a signal; counts forwards."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.count = 0
        self.busy = threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        time.sleep(self.seconds)
        if self.count == 6:
            self.busy.set()
        return x


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stages", "method", "how"),
    [
        (2, "fdg", "raise_signal"),
        (2, "fdg", "interrupt_main"),
        (2, "fdg", "kill"),
        (1, "fdg", "raise_signal"),
        (3, "fdg", "raise_signal"),
        (3, "ddg", "raise_signal"),
    ],
)
def test_ctrl_c_while_training(
    how: str, stages: int, method: str, no_thread_left: Callable[[], None]
) -> None:
    model, data = mlp(), batches(40, last=None)
    split = even_split(LAYERS, stages)
    known = versions(model, split, data, method=method)
    first, last = Slow(0.05), Slow(0.05)
    chain = nn.Sequential(first, *model[:-1], nn.Sequential(model[-1], last))
    at_signal = []

    def interrupt() -> None:
        if not last.busy.wait(10):
            return
        if how == "raise_signal":
            signal.raise_signal(signal.SIGINT)
        elif how == "interrupt_main":
            _thread.interrupt_main()
        else:
            os.kill(os.getpid(), signal.SIGINT)
        at_signal.extend([first.count, last.count])

    runner = runner_of(chain, stages, split=[index + 1 for index in split], method=method)
    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.fit(data)  # takes 2 s at least
    thread.join()
    no_thread_left()
    assert first.count <= at_signal[0] + 2
    assert last.count <= at_signal[1] + 2
    found = check_versions(model, split, known)
    assert found[-1] <= at_signal[1] + 2
    assert 0 < max(found) < 20
    # And on it goes from there.
    first.seconds = last.seconds = 0
    assert len(runner.fit(data).batch_losses) == 40


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_loader_is_read() -> None:
    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(batches(9)):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            yield batch

    model = mlp()
    known = versions(model, [4], batches(9))
    runner = runner_of(model)
    with pytest.raises(KeyboardInterrupt):
        runner.fit(loader())
    assert max(check_versions(model, [4], known)) <= 5
    runner.fit(batches(3))


class Crossing(dict[int, Any]):
    """Where the next signal comes when one was found here and is about to be taken out."""

    crossed = False

    def pop(self, *arguments: Any) -> Any:
        if not self.crossed:
            self.crossed = True
            signal.raise_signal(signal.SIGCHLD)
        return super().pop(*arguments)


def test_two_children_that_end_at_the_same_time() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, _: told.append(number))
    try:
        with Interrupts() as interrupts:
            interrupts._pending = Crossing()
            interrupts.hold()
            signal.raise_signal(signal.SIGCHLD)
            assert told == []
            interrupts.allow()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert told == [signal.SIGCHLD]


def test_a_child_that_ends_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch opens ten where a worker falls silent; its handler raises wherever that is."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make = vars(tempfile)["_mkstemp_inner"]

    def interrupted(*arguments: Any) -> Any:
        made = make(*arguments)
        signal.raise_signal(signal.SIGCHLD)
        return made

    def died(number: int, frame: object) -> None:
        raise RuntimeError("a worker died")

    before = signal.signal(signal.SIGCHLD, died)
    try:
        with nothing_left(), Interrupts() as interrupts:
            interrupts.allow()
            with monkeypatch.context() as patch:
                patch.setattr(tempfile, "_mkstemp_inner", interrupted)
                with tempfile.NamedTemporaryFile():
                    assert len(list(tmp_path.iterdir())) == 1
            with pytest.raises(RuntimeError, match="a worker died"):
                interrupts.allow()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not list(tmp_path.iterdir())


SCRIPT = """
import signal, sys, time, torch
from torch import nn
from fdg_cuda import FDGRunner

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.005)
        return x

model = nn.Sequential(nn.Linear(3, 4), Slow(), nn.Linear(4, 2))
data = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 2000
try:
    FDGRunner(model, ["cpu", "cpu"], split=[1]).fit(
        data, on_batch=lambda result: result.batch == 3 and print("busy", flush=True)
    )
finally:
    print("finite", all(p.isfinite().all() for p in model.parameters()), flush=True)
"""


def test_ctrl_c_ends_a_program_as_usual() -> None:
    """A real SIGINT: the traceback of KeyboardInterrupt, and the exit status that shells expect."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fdg_cuda.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert output == "finite True\n"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


class SignalAt:
    """Raises SIGINT at the ``number``-th place of the package's code at which Python looks for
    signals: the entry of a function, and the return from a function in C."""

    package = str(Path(fdg_cuda.__file__).parent)

    def __init__(self, number: int) -> None:
        self.left = number
        self.place = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(self.package):
            return
        if code.co_name == "<genexpr>":  # may be on its way to the garbage: Python drops it there
            return
        self.left -= 1
        if self.left == 0:
            self.place = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_any_place_of_the_package(no_thread_left: Callable[[], None]) -> None:
    """Every other place at which Python looks for signals."""
    data = batches(1, last=None)
    initial = state(mlp(layers=4))
    known = versions(mlp(layers=4), [2], data, epochs=2, momentum=0.0)
    expected, _ = oracle(mlp(layers=4), [2], data, epochs=2, lr=0.05, momentum=0.0)
    problems: list[str] = []
    for number in range(1, 100_000, 2):
        model = mlp(layers=4)
        own = parameters(model)
        runner = runner_of(model, momentum=0.0)
        interrupt = SignalAt(number)
        came_out = False
        try:
            sys.setprofile(interrupt)
            runner.fit(data, epochs=2)
        except KeyboardInterrupt:
            came_out = True
        finally:
            sys.setprofile(None)
        if not interrupt.place:
            break
        try:
            assert came_out, "KeyboardInterrupt did not come out of fit"
            no_thread_left()
            same = all(a is b for a, b in zip(parameters(model), own, strict=True))
            assert same, "the caller's parameters are no longer in the model"
            check_versions(model, [2], known)
            runner.load_state_dict(initial)
            runner.fit(data, epochs=2)
            difference = largest_difference(state(model), expected)
            assert difference < TOLERANCE, "the next fit trains something else"
        except (AssertionError, RuntimeError, pytest.fail.Exception) as problem:
            problems.append(f"{interrupt.place}: {str(problem).splitlines()[0]}")
    assert number > 200
    assert not problems, "\n".join([f"{len(problems)} bad places:", *sorted(set(problems))])
