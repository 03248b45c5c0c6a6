"""Measuring on a thread like a stage's, beside others at work like the other stages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from fdg_cuda.cpu_threads import torch_threads
from fdg_cuda.freed_memory import keep_freed, return_freed

Measured = TypeVar("Measured")


def measured_at_work(
    measure: Callable[[Callable[[], bool]], Measured], *, others: int, threads: int = 1
) -> Measured:
    """``measure`` on a thread of its own while ``others`` more compute, with ``threads`` intra-op
    threads each. One at a time in a process: the next one waits.

    On the caller's thread, with idle cores beside it, the same layers take less time than in a stage:
    the OpenMP runtime lets threads spin that wait for each other as long as there are no more than
    cores, and stages share caches and the memory's bandwidth.

    Args:
        measure: its argument says whether to stop before the end, since nobody wants its result.

    Raises:
        whatever ``measure`` raises.
    """
    stopped = threading.Event()
    with torch_threads:
        previous_threads = torch.get_num_threads()
        keep_freed()  # as in training
        try:
            with ThreadPoolExecutor(1 + others) as pool:
                company = [pool.submit(_compute_until, stopped, threads) for _ in range(others)]
                try:
                    measured = pool.submit(measure, stopped.is_set).result()
                finally:
                    stopped.set()
            for other in company:
                other.result()  # raises what ended it early
            return measured
        finally:
            return_freed()
            # torch takes the number set last, by whatever thread, for threads to come.
            torch.set_num_threads(previous_threads)


def _compute_until(stopped: threading.Event, threads: int) -> None:
    """Training of a few layers, over and over: some 10 ms and 10 MB at a time."""
    torch.get_num_threads()  # or the thread's first use of its count resets it to the default
    torch.set_num_threads(threads)
    weights = [_numbers(32, 32, 3, 3).requires_grad_() for _ in range(4)]
    x, error = _numbers(4, 32, 32, 32), _numbers(4, 32, 32, 32)
    while not stopped.is_set():
        output = x
        for weight in weights:
            output = functional.conv2d(output, weight, padding=1).relu()
        torch.autograd.grad([output], weights, [error])


def _numbers(*shape: int) -> Tensor:
    """Ordinary ones, and none of them drawn from torch's generator."""
    count = torch.Size(shape).numel()
    return torch.linspace(-0.1, 0.1, count, dtype=torch.float32, device="cpu").view(shape)
