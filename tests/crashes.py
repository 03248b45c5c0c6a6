"""A run that breaks off where a test wants it to."""

from __future__ import annotations

from fdg_cuda import BatchResult, Callback


class CrashError(Exception):
    pass


class Crash(Callback):
    """As a process that dies behind its ``after``-th batch, counted from 0; None: it lives."""

    def __init__(self, after: int | None) -> None:
        self.after = after
        self.seen = 0

    def on_batch_end(self, result: BatchResult) -> None:
        if self.seen == self.after:
            raise CrashError
        self.seen += 1
