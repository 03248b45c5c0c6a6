"""The scheduler's Python face: what closing it means for those who are using it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

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
        if last_call == "submit":
            scheduler.submit(tick, 4)
        else:
            scheduler.synchronize()
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


@pytest.mark.parametrize("daemon", [False, True], ids=["main thread", "daemon thread"])
def test_the_interpreter_may_end_with_a_scheduler_at_work(daemon: bool) -> None:
    program = f"""
import threading, time
from fdg_cuda._core import Scheduler
scheduler = Scheduler("cpu", ["only"])
action = scheduler.add_action(code="F", stage=0, slot=0, stream=0, reads=[], writes=[],
                              work=lambda batch: time.sleep(0.01))
tick = scheduler.add_tick([(action, 0)])
begun = threading.Event()
def submit():
    for number in range(4 if not {daemon} else 10**6):
        scheduler.submit(tick, number)
        begun.set()
if {daemon}:
    threading.Thread(target=submit, daemon=True).start()
    begun.wait()
else:
    submit()
print("the end", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
