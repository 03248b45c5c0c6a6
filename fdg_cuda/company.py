"""How much longer CPU stages take while others are at work."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from fdg_cuda._core import end_idle_openmp_threads
from fdg_cuda.at_work import measured_at_work
from fdg_cuda.batches import Batch
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.cpu_threads import set_threads_here
from fdg_cuda.nested import Nested, cloned, distinct, leaf_of, map_distinct
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision

MOST_ROUNDS = 9
# No more rounds than the least behind so many seconds, and none that would end beyond the limit but the
# first.
LEAST_ROUNDS, ENOUGH_SECONDS, LIMIT_SECONDS = 3, 6.0, 12.0


def slowdown_in_company(
    parts: Sequence[Sequence[nn.Module]],
    batch: Batch,
    loss: LossFunction,
    *,
    threads: int,
    precision: Precision,
) -> float:
    """How many times as long the slowest stage takes with all stages at work as it takes by itself.

    They share caches, the memory's bandwidth, and often the arithmetic units of a core. Each has what
    it had of ``batch`` in one pass through all of them, and does its forward and backward over and over
    again: alone, then at the same time as the others.

    Leaves no trace: buffers, gradients, the global random state and the thread count are as before.

    Args:
        parts: the layers of each stage; none is in two.
        threads: intra-op threads of each.

    Returns:
        At least 1: less is noise.
    """
    if len(parts) == 1:
        return 1.0

    def measured(stopped: Callable[[], bool]) -> float:
        layers = [layer for part in parts for layer in part]
        buffers = SavedBuffers(layers)
        gradients = [(p, p.grad) for layer in layers for p in layer.parameters()]
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                stages = _recorded(parts, batch, loss, precision)
                with _Crew(len(stages), threads) as crew:
                    return _slowdown(crew, [stage.seconds for stage in stages], stopped)
        finally:
            buffers.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient

    return measured_at_work(measured)


class _Stage:
    """One stage's work on one batch, which it can repeat."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        x: Nested,
        loss: Callable[[Nested], Tensor] | None,
        precision: Precision,
    ) -> None:
        self._layers = layers
        self._taken = map_distinct(leaf_of, x)
        self._loss = loss
        self._precision = precision
        # The gradients of what it gives.
        self.errors: Sequence[Tensor | None] = []

    def forward(self) -> tuple[list[Tensor], Nested]:
        """What it took, and what it gives."""
        leaf = map_distinct(leaf_of, self._taken)
        x = map_distinct(torch.clone, leaf)  # since a layer may work in place on its input
        with self._precision.autocast("cpu"):
            for layer in self._layers:
                x = layer(x)
            return distinct(leaf), x if self._loss is None else self._loss(x)

    def backward(self, given: Nested) -> None:
        outputs = distinct(given)
        if self._loss is not None:
            torch.autograd.backward(outputs)
        else:
            roots = [
                (output, error)
                for output, error in zip(outputs, self.errors, strict=True)
                if output.requires_grad and error is not None
            ]
            if roots:
                torch.autograd.backward([root for root, _ in roots], [error for _, error in roots])
        for layer in self._layers:
            for parameter in layer.parameters():
                parameter.grad = None

    def seconds(self) -> float:
        """Of a forward and a backward."""
        begin = time.perf_counter()
        _, given = self.forward()
        self.backward(given)
        return time.perf_counter() - begin


def _recorded(
    parts: Sequence[Sequence[nn.Module]], batch: Batch, loss: LossFunction, precision: Precision
) -> list[_Stage]:
    """The stages, each with what it takes of ``batch`` from those below and above."""
    x = map_distinct(torch.detach, batch[0])
    stages, passed = [], []
    for part in parts:
        last = part is parts[-1]
        stages.append(
            _Stage(part, x, (lambda x: loss(x, cloned(batch[1]))) if last else None, precision)
        )
        passed.append(stages[-1].forward())
        x = passed[-1][1]
    for number in reversed(range(len(parts))):
        taken, given = passed[number]
        stages[number].backward(given)
        if number > 0:
            stages[number - 1].errors = [leaf.grad for leaf in taken]
    return stages


def _slowdown(
    crew: _Crew, works: Sequence[Callable[[], float]], stopped: Callable[[], bool]
) -> float:
    crew.together(works)  # warms up
    alone: list[list[float]] = []
    company: list[list[float]] = []
    begin = time.perf_counter()
    longest = 0.0
    while len(alone) < MOST_ROUNDS:
        spent = time.perf_counter() - begin
        enough = len(alone) >= LEAST_ROUNDS and spent >= ENOUGH_SECONDS
        if alone and (stopped() or enough or spent + longest > LIMIT_SECONDS):
            break
        company.append(crew.together(works))
        alone.append(crew.one_by_one(works))
        longest = max(longest, time.perf_counter() - begin - spent)
    return max(1.0, _slowest(company) / _slowest(alone))


def _slowest(rounds: Sequence[Sequence[float]]) -> float:
    """The median of the stage whose is the largest."""
    return max(float(statistics.median(seconds)) for seconds in zip(*rounds, strict=True))


class _Crew:
    """A thread per stage, each with so many intra-op threads."""

    def __init__(self, size: int, threads: int) -> None:
        self._pools = [ThreadPoolExecutor(1) for _ in range(size)]
        self._ready = threading.Barrier(size)
        self._threads = threads

    def __enter__(self) -> _Crew:
        end_idle_openmp_threads()  # the stages have the cores to themselves
        for pool in self._pools:
            # One at a time: torch resizes a pool all threads share.
            pool.submit(set_threads_here, self._threads).result()
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()

    def one_by_one(self, works: Sequence[Callable[[], float]]) -> list[float]:
        """What each returns."""
        return [pool.submit(work).result() for pool, work in zip(self._pools, works, strict=True)]

    def together(self, works: Sequence[Callable[[], float]]) -> list[float]:
        """The same, all begun at once."""

        def when_all_are_ready(work: Callable[[], float]) -> float:
            self._ready.wait()
            return work()

        begun = [
            pool.submit(when_all_are_ready, work)
            for pool, work in zip(self._pools, works, strict=True)
        ]
        return [each.result() for each in begun]
