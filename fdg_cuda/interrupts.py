"""Ctrl-C while threads and shared memory are at work: raised only where it can do no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Between entering and leaving, SIGINT is delivered only after ``allow`` and until ``hold``.

    One that comes at another moment is delivered at the next ``allow`` or on leaving. Only one is
    raised before leaving, so what cleans up after it runs to its end. In threads other than the
    main one, which no signal interrupts, all of this does nothing.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._allowed = False
        self._delivered = False
        self._pending: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):
                self._previous = previous
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._deliver_pending()

    def allow(self) -> None:
        """From here on a Ctrl-C may interrupt; one that waited does so now."""
        self._allowed = True
        if not self._delivered:
            self._deliver_pending()

    def hold(self) -> None:
        """From here on a Ctrl-C waits."""
        self._allowed = False

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """``allow`` on entering, ``hold`` on leaving."""
        self.allow()
        try:
            yield
        finally:
            self.hold()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending = (number, frame)
        if self._allowed and not self._delivered:
            self._deliver_pending()

    def _deliver_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                self._previous(*pending)
            except BaseException:
                self._delivered = True
                raise
