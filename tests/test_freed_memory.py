"""Freed tensors' memory is kept for the next ones while stages on the CPU are at work, and then given
back. What is kept of it, and for whom, is in tests/cpp/test_block_cache.cpp."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from chains import batches, mlp, same_bits
from compiling import call_compiler
from forks import end_of, fork
from torch import Tensor, nn
from torch.nn import functional as F
from versions import runner_of, state

from fdg_cuda import cpu_pipeline
from fdg_cuda._core import keeps_blocks, kept_bytes
from fdg_cuda.freed_memory import KeptMemory

# What torch's own packages are made for; elsewhere it depends on who built it.
USUAL = platform.libc_ver()[0] == "glibc" and platform.machine() == "x86_64"
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left"),
    pytest.mark.skipif(not (USUAL or keeps_blocks()), reason="no blocks can be kept here"),
]
MEGABYTE = torch.Size([1 << 18])


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    assert keeps_blocks()
    assert kept_bytes() == 0
    yield
    assert kept_bytes() == 0


def test_the_next_tensor_gets_the_memory_of_the_last() -> None:
    with KeptMemory():
        first = torch.empty(MEGABYTE)
        address = first.data_ptr()
        del first
        assert kept_bytes() >= 1 << 20
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.empty(MEGABYTE)))
        thread.start()
        thread.join()
        assert found[0].data_ptr() == address


@pytest.mark.parametrize("method", ["fdg", "bp"])
@pytest.mark.parametrize("stages", [1, 3])
def test_while_stages_are_at_work(
    method: str, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        kept.append(kept_bytes())
        return F.cross_entropy(output, target)

    def trained() -> dict[str, Tensor]:
        kept.clear()
        torch.manual_seed(3)
        model = mlp()
        runner = runner_of(model, stages, method=method, loss_fn=loss)
        runner.fit(batches(6))
        runner.evaluate(batches(6))
        return state(model)

    weights = trained()
    assert kept[5] > 0, "in fit"
    assert kept[-1] > 0, "in evaluate"
    monkeypatch.setenv("FDG_KEEP_FREED_MEMORY", "0")
    assert same_bits(trained(), weights)
    assert not any(kept)


def test_given_back_behind_an_exception_and_an_iterator_that_was_left() -> None:
    class TroubleError(Exception):
        pass

    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise TroubleError

    with pytest.raises(TroubleError):
        runner_of(mlp(), 2, loss_fn=loss).fit(batches(4))
    assert kept_bytes() == 0
    outputs = runner_of(mlp(), 2).predict_batches(batches(8))
    next(outputs)
    assert kept_bytes() > 0
    outputs.close()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1024))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_no_page_faults_in_the_steady_state() -> None:
    """A batch's activations are 16,000 pages."""
    layers = [Scale() for _ in range(4)]
    data = [(torch.randn(4096, 1024), torch.randint(1024, (4096,)))] * 30
    faults: list[int] = []

    def count(_: object) -> None:
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    def per_batch() -> float:
        faults.clear()
        runner_of(nn.Sequential(*layers), 2).fit(data, on_batch=count)
        steps = [after - before for before, after in pairwise(faults[9:])]
        return statistics.median(steps)

    assert per_batch() < 100


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_fork_while_others_take_and_give() -> None:
    """Its child has only the thread that forked: a lock held by another one would stay so."""
    end = threading.Event()

    @torch.jit.script
    def many(total: Tensor) -> Tensor:  # without Python's lock
        for _ in range(10_000):
            total = total + 1
        return total

    def churn() -> None:
        while not end.is_set():
            many(torch.zeros(()))

    def small() -> None:
        assert torch.zeros(1000).sum() == 0

    threads = [threading.Thread(target=churn) for _ in range(3)]
    with KeptMemory():
        for thread in threads:
            thread.start()
        try:
            assert all(end_of(fork(small)) == 0 for _ in range(200))
        finally:
            end.set()
            for thread in threads:
                thread.join()


def output_of(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


SHORT = """
import resource, torch
from fdg_cuda._core import kept_bytes
from fdg_cuda.freed_memory import KeptMemory
resource.setrlimit(resource.RLIMIT_AS, (1 << 38, 1 << 38))
with KeptMemory():
    for _ in range(2):
        torch.empty(1 << 18)
        assert kept_bytes() >= 1 << 20
        try:
            torch.empty(1 << 37)
        except RuntimeError as error:
            print("can't allocate memory" in str(error), kept_bytes())
    # What was not to be had is not counted as the most that was in use.
    tensors = [torch.empty(1 << 18) for _ in range(8)]
    del tensors
    for size in range(1 << 18, 1 << 19, 1 << 13):
        torch.empty(size)
    print(kept_bytes() <= 13 << 20)
"""


def test_more_than_there_is() -> None:
    """What is kept goes back before torch is refused anything, with its own words."""
    assert output_of(SHORT) == "True 0\nTrue 0\nTrue\n"


PROFILED = """
import torch
from fdg_cuda.freed_memory import KeptMemory
with KeptMemory():
    torch.empty(1 << 18)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        torch.empty(1 << 18)
print(max(event.self_cpu_memory_usage for event in profile.key_averages()))
"""


def test_the_profiler_sees_every_tensor() -> None:
    """In a process of its own: its thread stays."""
    assert output_of(PROFILED) == f"{1 << 20}\n"


PRELOADED = """
extern "C" void* memalign(unsigned long, unsigned long);
extern "C" int posix_memalign(void** block, unsigned long alignment, unsigned long bytes) {
  return (*block = memalign(alignment, bytes)) ? 0 : 12;
}
"""


def test_an_allocator_of_the_users_choice_is_left_alone(tmp_path: Path) -> None:
    source, library = tmp_path / "own.cpp", tmp_path / "libown.so"
    source.write_text(PRELOADED)
    call_compiler("-shared", "-fPIC", source, "-o", library)
    code = """
import torch
from fdg_cuda import _core
memory = _core.FreedMemory()
torch.empty(1 << 18)
print(_core.keeps_blocks(), _core.kept_bytes())
memory.close()
"""
    assert output_of(code, LD_PRELOAD=str(library)) == "False 0\n"


def test_kept_until_everyone_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = KeptMemory(), KeptMemory()
    torch.empty(MEGABYTE)
    first.close()
    first.close()
    assert kept_bytes() > 0
    monkeypatch.setenv("FDG_KEEP_FREED_MEMORY", "0")
    KeptMemory().close()
    assert kept_bytes() > 0
    second.close()
    assert kept_bytes() == 0
    monkeypatch.undo()
    abandoned = KeptMemory()
    torch.empty(MEGABYTE)
    del abandoned
    assert kept_bytes() == 0


def test_a_child_of_a_fork_keeps_nothing() -> None:
    """The workers of a loader, say."""

    def work() -> None:
        assert kept_bytes() == 0
        torch.empty(1000)
        assert kept_bytes() == 0
        with KeptMemory():
            torch.empty(1000)
            assert kept_bytes() > 0
        assert kept_bytes() == 0

    with KeptMemory():
        torch.empty(MEGABYTE)
        assert end_of(fork(work)) == 0
        assert kept_bytes() > 0


def test_one_that_came_through_a_fork_ends_nothing_of_the_child_s_own() -> None:
    def work() -> None:
        with KeptMemory():
            inherited.close()
            torch.empty(1000)
            assert kept_bytes() > 0

    with KeptMemory() as inherited:
        assert end_of(fork(work)) == 0


def test_nothing_is_kept_where_a_scheduler_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoThreadError(Exception):
        pass

    def scheduler(*_: object, **__: object) -> None:
        raise NoThreadError

    monkeypatch.setattr(cpu_pipeline, "Scheduler", scheduler)
    with pytest.raises(NoThreadError) as caught:  # which has everything that was there
        runner_of(mlp(), 2).fit(batches(2))
    torch.empty(MEGABYTE)
    assert kept_bytes() == 0
    assert caught.value is not None


def test_goes_back_to_the_system() -> None:
    """Also what the C library had in its heaps."""

    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    before = resident()
    with KeptMemory():
        tensors = [torch.ones(MEGABYTE) for _ in range(200)]
        del tensors
        assert resident() > before + (150 << 20)
    assert resident() < before + (50 << 20)
