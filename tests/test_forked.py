"""What works in a child of a fork, to which none of the parent's threads came."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def output_of(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    return done.stdout


# A child that hangs is ended, and said so.
WAIT = """
def end_of(child):
    for _ in range(600):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    print("the child hangs", flush=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""

# Measuring for the cut ends idle OpenMP threads, which waits for them.
TRAIN_IN_CHILD = """
import os, signal, time, torch
from torch import nn
from fdg_cuda import FDGRunner
torch.set_num_threads(2)
torch.zeros(1 << 20).add_(1)  # with two threads
data = [(torch.randn(4, 8), torch.randint(8, (4,)))] * 4
net = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())])
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # what one has to do there for torch itself
    print(len(FDGRunner(net, ["cpu", "cpu"], cpu_threads=2).fit(data).batch_losses), flush=True)
    os._exit(0)
end_of(child)
"""


def test_training_with_the_cut_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    assert output_of(WAIT + TRAIN_IN_CHILD) == "4\n"


FORK_WHILE_FITTING = """
import os, signal, sys, threading, time, torch
from torch import nn
from fdg_cuda import FDGRunner
begun = threading.Event()
class Slow(nn.Module):
    def forward(self, x):
        begun.set()  # the fork comes while nobody computes
        time.sleep(0.05)
        return x
net = nn.Sequential(nn.Linear(8, 8), Slow(), nn.Linear(8, 8))
runner = FDGRunner(net, ["cpu", "cpu"], split=[2], cpu_threads=2)
data = [(torch.randn(4, 8), torch.randint(8, (4,)))] * 600
thread = threading.Thread(target=lambda: runner.fit(data))
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    {work}
    sys.exit()
end_of(child)
runner.stop()
thread.join()
print("ends")
"""
TRAIN_ANOTHER = """torch.set_num_threads(1)
    own = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    print(len(FDGRunner(own, ["cpu", "cpu"], split=[1]).fit(data[:4]).batch_losses), flush=True)"""


@pytest.mark.parametrize(
    ("work", "said"), [("pass", ""), (TRAIN_ANOTHER, "4\n")], ids=["nothing", "training"]
)
def test_it_ends_though_the_parent_is_in_a_fit(work: str, said: str) -> None:
    """As a program ends, with the interpreter: that waits for what runs without Python's lock."""
    assert output_of(WAIT + FORK_WHILE_FITTING.format(work=work)) == f"{said}ends\n"


FORK_IN_A_FIT = """
import os, threading, torch
from torch import nn
from fdg_cuda import FDGRunner
runner = FDGRunner(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["cpu", "cpu"], split=[1])
def fork(result):
    if result.batch:
        return
    if os.fork() == 0:
        raise ValueError("of the child")
    os.wait()
def fit():
    try:
        runner.fit([(torch.randn(4, 8), torch.randint(8, (4,)))] * 4, on_batch=fork)
    except ValueError as error:
        print(error, flush=True)
        os._exit(0)
thread = threading.Thread(target=fit)
thread.start()
thread.join()
print("ends")
"""


def test_a_fork_in_a_callback_raises_what_the_child_raises() -> None:
    assert output_of(FORK_IN_A_FIT) == "of the child\nends\n"


USE_THE_PARENTS = """
import os, signal, sys, time
from fdg_cuda._core import Scheduler
scheduler = Scheduler("cpu", ["only"])
child = os.fork()
if child == 0:
    try:
        scheduler.synchronize()
    except RuntimeError as error:
        print(error, flush=True)
    sys.exit()
end_of(child)
scheduler.synchronize()
"""


def test_a_scheduler_of_the_parent_is_refused() -> None:
    assert output_of(WAIT + USE_THE_PARENTS) == (
        "this scheduler's threads are in the process that forked this one\n"
    )
