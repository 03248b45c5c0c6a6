"""Whether the memory of tensors on the CPU is kept, when they are freed, for those that come next.

Without, every batch pays for its activations anew: in page faults, and in waiting for the C library's
lock. See csrc/cpu/allocator.h.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fdg_cuda._core import keep_freed_memory, return_freed_memory


def keep_freed() -> None:
    """From now on, in the whole process, until :func:`return_freed` was called as often. Not if
    ``FDG_KEEP_FREED_MEMORY`` is 0."""
    # Before threads start that are to profit: where torch's blocks cannot be kept it is a thread's
    # arena that keeps, the one it begins with.
    if _wanted():
        keep_freed_memory()


def return_freed() -> None:
    """Give it back to the system, and from now on what is freed."""
    if _wanted():
        return_freed_memory()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it freed memory is kept."""
    keep_freed()
    try:
        yield
    finally:
        return_freed()


def _wanted() -> bool:
    return os.environ.get("FDG_KEEP_FREED_MEMORY", "1") != "0"
