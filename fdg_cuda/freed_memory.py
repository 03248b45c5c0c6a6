"""Whether the memory of tensors on the CPU is kept, when they are freed, for those that come next.

Without, every batch pays for its activations anew: in page faults, and in waiting for the C library's
lock. See csrc/cpu/allocator.h.
"""

from __future__ import annotations

import logging
import os
from functools import cache

from fdg_cuda._core import FreedMemory, keeps_blocks
from fdg_cuda.interrupts import Interrupts

logger = logging.getLogger("fdg_cuda")


class KeptMemory:
    """From now on, in the whole process, freed memory is kept, until all that were made are closed.
    Not if ``FDG_KEEP_FREED_MEMORY`` is 0.

    Can be used in ``with``; one that nobody has any more is closed.
    """

    def __init__(self) -> None:
        # Before threads start that are to profit: where torch's blocks cannot be kept it is a thread's
        # arena that keeps, the one it begins with.
        self._memory: FreedMemory | None = None
        if os.environ.get("FDG_KEEP_FREED_MEMORY", "1") == "0":
            return
        _say_where_blocks_cannot_be_kept()
        with Interrupts():
            self._memory = FreedMemory()

    def close(self) -> None:
        """Give it back to the system, and from now on what is freed. Does nothing the second time."""
        if self._memory is not None:
            with Interrupts():
                self._memory.close()

    def __enter__(self) -> KeptMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def _say_where_blocks_cannot_be_kept() -> None:
    if not keeps_blocks():
        logger.info(
            "torch's calls of the C allocator cannot be led through a cache here: what is freed is "
            "kept by the allocator's own means, if it has any"
        )
