"""What a test must not leave: child processes and open files."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

PATIENCE_SECONDS = 5.0


def children() -> set[int]:
    """Process ids of this process's children that run, or that nobody will ask how they ended.

    Without the one that ``multiprocessing`` starts with the first spawned process and keeps to the end.
    """
    multiprocessing.active_children()  # which asks those of its own; else the next start would
    while (found := _children_of_every_thread()) is None:
        pass
    return found - {resource_tracker._resource_tracker._pid}


def _children_of_every_thread() -> set[int] | None:
    """None if a thread ended meanwhile: its children belong to another one then."""
    tasks = Path("/proc/self/task")
    threads = set(os.listdir(tasks))
    try:
        lists = [(tasks / thread / "children").read_text() for thread in threads]
    except (FileNotFoundError, ProcessLookupError):
        return None
    if threads - set(os.listdir(tasks)):
        return None
    return {int(pid) for each in lists for pid in each.split()}


def descriptors() -> dict[str, str]:
    """Number and target of every open file but the one that lists them, and that which leads to the
    process ``children`` leaves out."""
    found = {}
    for number in set(os.listdir("/proc/self/fd")) - {str(resource_tracker._resource_tracker._fd)}:
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        found[number] = target
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails if there are other processes or files behind the block than before it.

    Exceptions caught in the block are to be forgotten by then: a traceback keeps what its frames
    refer to, such as the iterator of a torch ``DataLoader`` and its workers.
    """
    gc.collect()
    processes, files = children(), descriptors()
    yield
    give_up = time.monotonic() + PATIENCE_SECONDS
    gc.collect()
    while left := [*(children() - processes), *(descriptors().items() - files.items())]:
        assert time.monotonic() < give_up, f"left: {left}"
        time.sleep(0.01)
        gc.collect()
