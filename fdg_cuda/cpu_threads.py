"""How many intra-op threads each stage on the CPU computes with, and the thread that feeds them."""

from __future__ import annotations

import threading

import torch

from fdg_cuda._core import (
    Scheduler,
    end_idle_openmp_threads,
    openmp_threads,
    set_openmp_threads,
)

# Held by whoever changes torch's default number of intra-op threads, or relies on it.
torch_threads = threading.Lock()


def share_of_cores(cores: int | None, stages: int) -> int:
    """The intra-op threads of each of ``stages`` stages that work at the same time.

    Args:
        cores: they share; None: ``torch.get_num_threads()``.
    """
    with torch_threads:
        return max(1, (cores or torch.get_num_threads()) // stages)


def set_threads_here(threads: int) -> None:
    """The calling thread computes with so many intra-op threads from now on."""
    torch.get_num_threads()  # or the thread's first use of its count resets it to the default
    torch.set_num_threads(threads)


def set_threads_of_streams(scheduler: Scheduler, streams: int, threads: int) -> None:
    """The threads of the first ``streams`` streams compute with ``threads`` intra-op threads from now
    on. Only while nothing runs.

    torch makes the count set last, by whatever thread, the default of threads to come. So it is
    put back at once, and other runners are kept from reading it meanwhile.
    """

    with torch_threads:
        previous = torch.get_num_threads()
        try:
            # One stream at a time: torch resizes a pool all threads share.
            for stream in range(streams):
                action = scheduler.add_action(
                    code="T",
                    stage=stream,
                    slot=0,
                    stream=stream,
                    reads=[],
                    writes=[],
                    work=lambda _: set_threads_here(threads),
                )
                scheduler.submit(scheduler.add_tick([(action, 0)]), 0)
                scheduler.synchronize()
        finally:
            torch.set_num_threads(previous)


class Feeding:
    """A context manager of the thread that reads and hands over the stages' batches: within it, it
    computes with the cores that the stages leave, and with one if they leave none. Its idle threads
    end, which would slow the stages down. What the MKL computes goes by torch's count all the same.

    Args:
        busy: cores that the stages compute with.
    """

    def __init__(self, busy: int) -> None:
        self._busy = busy
        self._own = 0
        self._all = 0  # that it had before; 0: it has them

    def __enter__(self) -> None:
        torch.get_num_threads()  # or the thread's first use of its count resets it to the default
        threads = openmp_threads()
        self._own = max(1, threads - self._busy)
        self._all = threads
        set_openmp_threads(self._own)

    def __exit__(self, *_: object) -> None:
        if self._own < self._all:
            end_idle_openmp_threads()
        self.end()

    def end(self) -> None:
        """Give the thread back what it had, if an interrupt on the way in or out left it without."""
        # Else the loader has set it; to the same number it cannot.
        if self._all and openmp_threads() == self._own:
            set_openmp_threads(self._all)
        self._all = 0
