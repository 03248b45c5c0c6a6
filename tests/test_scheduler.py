"""The scheduler's Python face: what closing it means for those who are using it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from fdg_cuda._core import Scheduler


def scheduler_of(work: Callable[[int], None]) -> tuple[Scheduler, int]:
    """A scheduler and a tick of it, in which ``work`` runs on its only stream."""
    scheduler = Scheduler("cpu", ["only"])
    action = scheduler.add_action(
        code="F", stage=0, slot=0, stream=0, reads=[], writes=[], work=work
    )
    return scheduler, scheduler.add_tick([(action, 0)])


def test_closed_is_closed() -> None:
    scheduler, tick = scheduler_of(lambda _: None)
    scheduler.close()
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(tick, 0)


@pytest.mark.parametrize("last_call", ["synchronize", "submit"])
def test_close_ends_what_another_thread_waits_for(last_call: str) -> None:
    begun, go_on = threading.Event(), threading.Event()
    ran: list[int] = []

    def work(batch: int) -> None:
        begun.set()
        assert go_on.wait(60)
        ran.append(batch)

    scheduler, tick = scheduler_of(work)
    returned = threading.Event()

    def use() -> None:
        for number in range(4):  # as many as may be in flight
            scheduler.submit(tick, number)
        call = {"submit": partial(scheduler.submit, tick, 4), "synchronize": scheduler.synchronize}
        with pytest.raises(RuntimeError, match="closed"):
            call[last_call]()
        returned.set()

    user = threading.Thread(target=use)
    user.start()
    assert begun.wait(60)
    assert not returned.wait(0.05)
    scheduler.close()
    go_on.set()
    user.join(60)
    assert returned.is_set()
    assert ran == [0]  # what had not begun was dropped


def test_close_within_an_action(no_thread_left: Callable[[], None]) -> None:
    closed = threading.Event()

    def work(_: int) -> None:
        scheduler.close()
        closed.set()

    scheduler, tick = scheduler_of(work)
    scheduler.submit(tick, 0)
    assert closed.wait(60)
    no_thread_left()


def ends_well(program: str) -> str:
    """What it says in the end of what went wrong in its threads."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
    return done.stderr


SCHEDULER = """
import threading, time
from fdg_cuda._core import Scheduler
scheduler = Scheduler("cpu", ["only"])
begun = threading.Event()
def work(batch):
    begun.set()
    time.sleep({seconds})
action = scheduler.add_action(code="F", stage=0, slot=0, stream=0, reads=[], writes=[], work=work)
tick = scheduler.add_tick([(action, 0)])
def submit(count):
    for number in range(count):
        scheduler.submit(tick, number)
"""
FIT = """
import threading, torch
from torch import nn
from fdg_cuda import FDGRunner
begun = threading.Event()
def loss_fn(output, target):
    begun.set()
    return nn.functional.cross_entropy(output, target)
def fit():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    runner = FDGRunner(model, ["cpu", "cpu"], split=[1], loss_fn=loss_fn)
    runner.fit([(torch.randn(8, 4), torch.randint(0, 2, (8,)))] * 1000, epochs=1000)
"""
END = "begun.wait()\nprint('the end', flush=True)\n"
IN_DAEMON = "threading.Thread(target={}, daemon=True).start()\n"


@pytest.mark.parametrize("seconds", [0.01, 0.5])
def test_the_interpreter_may_end_with_a_scheduler_at_work(seconds: float) -> None:
    ends_well(SCHEDULER.format(seconds=seconds) + "submit(4)\n" + END)


@pytest.mark.parametrize("seconds", [0.01, 0.5])
def test_the_interpreter_may_end_while_a_daemon_thread_submits(seconds: float) -> None:
    submits = IN_DAEMON.format("lambda: submit(10**6)")
    ends_well(SCHEDULER.format(seconds=seconds) + submits + END)


def test_the_interpreter_may_end_while_a_daemon_thread_fits() -> None:
    ends_well(FIT + IN_DAEMON.format("fit") + END)


FIT_AND_FREE = """
def fit_and_free():
    tensors = [torch.empty(1) for _ in range(100000)]
    try:
        fit()
    except RuntimeError:  # the scheduler was closed
        pass
"""


def test_the_interpreter_may_end_while_a_daemon_thread_frees_what_its_fit_had() -> None:
    """Torch lets go of Python's lock to free a tensor, and takes it again."""
    ends_well(FIT + FIT_AND_FREE + IN_DAEMON.format("fit_and_free") + END)


FIT_AGAIN = """
import sys, time
def fit_again():
    for _ in range(2):
        try:
            fit()
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
    while True:
        time.sleep(0.001)
"""


def test_the_interpreter_may_end_while_a_daemon_thread_goes_on() -> None:
    """A fit behind the one that was ended is refused, and the end does not wait for the thread."""
    said = ends_well(FIT + FIT_AGAIN + IN_DAEMON.format("fit_again") + END)
    assert said == "this scheduler was closed by another thread\nthe interpreter is ending\n"


STOP_AND_FREE = """
def stop_and_free():
    tensors = [torch.empty(1) for _ in range(100000)]
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    runner = FDGRunner(model, ["cpu", "cpu"], split=[1])
    runner.fit([(torch.randn(8, 4), torch.randint(0, 2, (8,)))] * 4)
    begun.set()
"""


def test_the_interpreter_may_end_right_behind_a_daemon_thread_s_fit() -> None:
    ends_well(FIT + STOP_AND_FREE + IN_DAEMON.format("stop_and_free") + END)


@pytest.mark.parametrize(
    ("number", "handler", "status"),
    [
        (signal.SIGINT, "signal.default_int_handler", -signal.SIGINT),
        (signal.SIGTERM, "lambda *_: sys.exit(3)", 3),
    ],
)
def test_signals_end_what_the_interpreter_s_end_waits_for(
    number: signal.Signals, handler: str, status: int
) -> None:
    """An action under way is waited for, however long it takes."""
    program = f"import signal, sys\nsignal.signal({int(number)}, {handler})\n"
    program += SCHEDULER.format(seconds=60) + "submit(1)\nbegun.wait()\nprint('the end')\n"
    ending = "import atexit, os\natexit.register(lambda: os.write(2, b'ending\\n'))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program + ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ending\n"
    for _ in range(300):  # the first may meet what was registered behind, and be said there
        process.send_signal(number)
        time.sleep(0.1)
        if process.poll() is not None:
            break
    process.kill()
    output, said = process.communicate()
    assert process.returncode == status, said
    assert output == "the end\n"
