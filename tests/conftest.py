"""Fixtures of all tests: a cache folder of their own, and a check that no thread is left running."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from commands import Cli

TASKS = Path("/proc/self/task")
POOL_THREADS = torch.get_num_threads()
PATIENCE_SECONDS = 5.0


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's own layer times out of the tests, and the tests' out of the user's."""
    folder = tmp_path_factory.mktemp("fdg_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FDG_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def threads_of_torch() -> int:
    """Operating system threads once torch has started everything it starts once per process."""
    image = torch.zeros(2, 3, 8, 8, requires_grad=True)
    torch.nn.Conv2d(3, 4, 3)(image).sum().backward()
    return settled_thread_count()


@pytest.fixture
def no_thread_left(threads_of_torch: int) -> Iterator[Callable[[], None]]:
    """Fail if the test, or what came before a call of the value, left an operating system thread.

    OpenMP's pool for the calling thread is no leak, and nothing but its size tells its threads from
    others. So counts are compared that were taken just behind a parallel region of one and the same
    size, which leaves a pool of that size (and is costly on busy cores: left out where the count is
    what it was). The pools of other threads end with them. A thread that has been joined may be
    listed for a moment longer, hence the patience.
    """
    before = threads_of_torch if count_threads() == threads_of_torch else settled_thread_count()
    torch_threads = torch.get_num_threads()

    def check() -> None:
        assert torch.get_num_threads() == torch_threads, "the thread count of torch was changed"
        give_up = time.monotonic() + PATIENCE_SECONDS
        while (now := count_threads()) != before:
            resize_openmp_pool()
            now = count_threads()
            if now <= before:
                break
            if time.monotonic() > give_up:
                pytest.fail(f"{now - before} threads are left; running now: {thread_names()}")
            time.sleep(0.002)

    yield check
    check()


def resize_openmp_pool() -> None:
    """Give the calling thread a pool of ``POOL_THREADS``, whatever size it had."""
    previous = torch.get_num_threads()
    torch.set_num_threads(POOL_THREADS)
    torch.ones(1 << 18).add_(1)
    torch.set_num_threads(previous)


def count_threads() -> int:
    return len(os.listdir(TASKS))


def settled_thread_count() -> int:
    """The count with a pool of known size, once threads that are just ending are gone."""
    resize_openmp_pool()
    count, previous = count_threads(), -1
    while count != previous:
        time.sleep(0.005)
        count, previous = count_threads(), count
    return count


def thread_names() -> list[str]:
    return [(task / "comm").read_text().strip() for task in TASKS.iterdir()]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler for Ctrl-C, whatever the test run was started under."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Parallel regions over tiny tensors take milliseconds each where others use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def four_torch_threads(one_torch_thread: None, no_thread_left: None) -> Iterator[None]:
    """Perhaps more than there are cores: what counts here is what is asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Cli]:
    """Runs the command line in this process, in an empty folder; returns its exit code."""
    from fdg_cuda import cli  # which the tests of the core do without

    def run(arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fdg-cuda", *shlex.split(arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield run
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one; where FDG_REQUIRE_GPU=1 they fail instead."""
    if os.environ.get("FDG_REQUIRE_GPU") == "1" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device (FDG_REQUIRE_GPU=1 demands one)")
            )
