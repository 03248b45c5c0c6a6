"""Whether the C allocator keeps what is freed while stages on the CPU are at work."""

from __future__ import annotations

import os

from fdg_cuda._core import keep_freed_memory, return_freed_memory


def keep_freed() -> None:
    """From now on, for threads that start now: a thread keeps the arena it begins with. Not if
    ``FDG_KEEP_FREED_MEMORY`` is 0."""
    if _wanted():
        keep_freed_memory()


def return_freed() -> None:
    """Give it back to the system, and from now on what is freed."""
    if _wanted():
        return_freed_memory()


def _wanted() -> bool:
    return os.environ.get("FDG_KEEP_FREED_MEMORY", "1") != "0"
