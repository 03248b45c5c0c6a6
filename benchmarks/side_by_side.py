"""Work in processes of its own, and an end that leaves none of them running."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def side_by_side(
    tasks: Sequence[Callable[[], T]], processes: int
) -> Iterator[Iterator[tuple[int, T]]]:
    """The number and the value of each task, as they end; begun in their order.

    They run in ``processes`` processes (1: in this one). If the block is left by an exception, Ctrl-C
    too, or this process dies, those end at once.

    Args:
        tasks: picklable.

    Raises:
        Exception: while iterating, what a task raised.
    """
    if processes == 1:
        yield ((number, task()) for number, task in enumerate(tasks))
        return
    others = set(active_children())
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_prepare)
    try:
        numbers = {pool.submit(task): number for number, task in enumerate(tasks)}
        yield ((numbers[future], future.result()) for future in as_completed(numbers))
    except BaseException:
        for child in set(active_children()) - others:
            child.terminate()  # and left to the pool to join: of two that do one may miss the end
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    """In a process of the pool, before any task."""
    # A terminal sends Ctrl-C to all; only the caller can tell what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
