"""The operating system's threads of this process."""

from __future__ import annotations

import os
import time


def os_threads() -> int:
    """How many there are, once that stays so: one that ended is listed for a moment longer."""
    give_up = time.monotonic() + 10
    seen = [0] * 5
    while len(set(seen)) > 1 or not seen[0]:
        assert time.monotonic() < give_up
        time.sleep(0.01)
        seen = [*seen[1:], len(os.listdir("/proc/self/task"))]
    return seen[0]
