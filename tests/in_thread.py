"""Another Python thread than the main one."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_thread(function: Callable[[], None]) -> threading.Thread:
    """Started, and its exception is an error of the test (pytest's filterwarnings)."""
    thread = threading.Thread(target=function)
    thread.start()
    return thread
