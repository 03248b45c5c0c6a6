"""How much longer CPU stages take that are at work at the same time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from fdg_cuda.at_work import measured_at_work
from fdg_cuda.batches import Batch
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision
from fdg_cuda.whole_pass import run_whole

# Each stage has a copy of the whole model meanwhile: no more than so many, however many there will be.
MOST_STAGES = 8
MOST_ROUNDS, LEAST_ROUNDS = 9, 3
ENOUGH_SECONDS = 6.0


class CopyError(Exception):
    """The model cannot be copied; the message says why."""


def slowdown_in_company(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: LossFunction,
    *,
    stages: int,
    threads: int,
    precision: Precision,
) -> float:
    """How many times as long a tick of ``stages`` equal stages takes as one of them alone.

    They share caches, the memory's bandwidth and often a core's arithmetic units; and a tick ends with
    the slowest of them, which is another one each time. Every stage is the whole chain here: the median
    over rounds of a pass alone and a pass of all at once.

    Leaves no trace, as :func:`fdg_cuda.costs.measure`.

    Args:
        threads: intra-op threads of each.

    Raises:
        CopyError: copies are needed, and cannot be made.
    """
    stages = min(stages, MOST_STAGES)
    if stages == 1:
        return 1.0
    try:
        copies = [copy.deepcopy(list(layers)) for _ in range(stages)]
    except Exception as error:
        raise CopyError(f"{type(error).__name__}: {error}") from error

    def measured(stopped: Callable[[], bool]) -> float:
        with (
            ThreadPoolExecutor(stages, initializer=partial(_set_threads, threads)) as pool,
            torch.random.fork_rng(devices=[]),
        ):

            def tick(members: Sequence[Sequence[nn.Module]]) -> float:
                spans = pool.map(
                    partial(_span, batch=batch, loss=loss, precision=precision), members
                )
                begins, ends = zip(*spans, strict=True)
                return float(max(ends) - min(begins))

            return _median_ratio(lambda: tick(copies[:1]), lambda: tick(copies), stopped)

    return measured_at_work(measured)


def _median_ratio(
    alone: Callable[[], float], together: Callable[[], float], stopped: Callable[[], bool]
) -> float:
    """At least 1: less is noise."""
    together()  # warms up
    ratios: list[float] = []
    begin = time.perf_counter()
    while len(ratios) < MOST_ROUNDS and not stopped():
        if len(ratios) >= LEAST_ROUNDS and time.perf_counter() - begin > ENOUGH_SECONDS:
            break
        ratios.append(together() / alone())
    return max(1.0, statistics.median(ratios)) if ratios else 1.0


def _span(
    layers: Sequence[nn.Module], batch: Batch, loss: LossFunction, precision: Precision
) -> tuple[float, float]:
    """When a pass began and ended."""
    begin = time.perf_counter()
    run_whole(layers, batch, loss, precision)
    return begin, time.perf_counter()


def _set_threads(threads: int) -> None:
    torch.get_num_threads()  # or the thread's first use of its count resets it to the default
    torch.set_num_threads(threads)
