"""Measuring where stages compute: on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fdg_cuda._core import end_idle_openmp_threads
from fdg_cuda.cpu_threads import torch_threads
from fdg_cuda.freed_memory import KeptMemory

Measured = TypeVar("Measured")


def measured_at_work(measure: Callable[[Callable[[], bool]], Measured]) -> Measured:
    """``measure`` on a thread of its own. One at a time in a process: the next one waits.

    Args:
        measure: its argument says whether to stop before the end, since nobody wants its result.

    Raises:
        whatever ``measure`` raises.
    """
    stopped = threading.Event()
    with torch_threads, KeptMemory():  # as in training
        previous_threads = torch.get_num_threads()
        end_idle_openmp_threads()  # likewise
        try:
            with ThreadPoolExecutor(1) as pool:
                try:
                    return pool.submit(measure, stopped.is_set).result()
                finally:
                    stopped.set()
        finally:
            # torch takes the number set last, by whatever thread, for threads to come.
            torch.set_num_threads(previous_threads)
