"""One epoch of a ``fit``: the hyper-parameters move on, results are reported as they become known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from fdg_cuda.batches import Batch
from fdg_cuda.metrics import Average, BatchResult, EpochResult, History
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.pipeline import Pipeline


def train_epoch(
    pipeline: Pipeline,
    batches: Iterator[Batch],
    epoch: int,
    optimizer: DelayedOptimizer,
    history: History,
    step_batch: Callable[[], object] | None,
    on_batch: Callable[[BatchResult], object] | None,
) -> EpochResult:
    """Train one epoch on ``pipeline``; losses go to ``history``, batches to ``on_batch``.

    ``optimizer`` is stepped for every batch that entered, and ``step_batch`` is called behind it.
    """
    begin = time.perf_counter()
    average = Average()
    reported = 0

    def report(known: int) -> None:
        nonlocal reported
        while reported < known:
            loss, samples, correct = pipeline.results[reported]
            average.add(loss, samples, correct)
            history.batch_losses.append(loss)
            if on_batch is not None:
                on_batch(BatchResult(reported, epoch, loss, samples, correct))
            reported += 1

    def entered() -> None:
        optimizer.step()
        if step_batch is not None:
            step_batch()

    pipeline.run_epoch(epoch, batches, entered=entered, known=report)
    averages = average.result()
    return EpochResult(
        epoch=epoch,
        loss=averages.loss,
        accuracy=averages.accuracy,
        samples=averages.samples,
        batches=reported,
        seconds=time.perf_counter() - begin,
    )
