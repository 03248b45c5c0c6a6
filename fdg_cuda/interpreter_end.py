"""Threads that the end of the interpreter has to wait for.

Python ends a thread that wants its lock once the interpreter is gone, in the midst of C++ frames of
torch, which takes the process down. See csrc/python/python_work.h.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fdg_cuda._core import fit_begins, fit_ends


@contextmanager
def awaited() -> Iterator[None]:
    """The interpreter's end waits for what other threads than the main one do within, and a moment for
    them to free what they had.

    Raises:
        RuntimeError: on entering, in such a thread: the interpreter is ending.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    thread = fit_begins()
    try:
        yield
    finally:
        fit_ends(thread)
