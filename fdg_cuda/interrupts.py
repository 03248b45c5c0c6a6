"""Signals while threads and shared memory are at work: they take effect only where it does no harm."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fdg_cuda.errors import is_death_of_worker


class Interrupts:
    """Between entering and leaving, SIGINT is delivered only after ``allow`` and until ``hold``.

    One that comes at another moment is delivered at the next ``allow`` or on leaving. Only one is
    raised before leaving, so what cleans up after it runs to its end. In threads other than the
    main one, which no signal interrupts, all of this does nothing.

    The same holds for SIGCHLD, if something listens to it: torch raises an error in its handler when a
    worker of a ``DataLoader`` died. Once training is to stop it is not raised, since whatever stops this
    process may have stopped its workers too. Nor is it raised while a temporary file is being opened
    or closed: torch opens some where a worker falls silent, and one would be left.

    Args:
        graceful: the first SIGINT or SIGTERM only fills :attr:`stop_signal`. The second SIGINT is
            delivered as above; the second SIGTERM does what it would have done without this.
    """

    def __init__(self, *, graceful: bool = False) -> None:
        self._graceful = graceful
        self._previous: dict[int, Any] = {}
        self._allowed = False
        self._delivered = False
        self._in_main_thread = False
        self._pending: dict[int, FrameType | None] = {}
        self.stop_signal: str | None = None  # the name of the signal that asks to stop

    def __enter__(self) -> Interrupts:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._take_over(signal.SIGINT)
            if self._graceful:
                self._take_over(signal.SIGTERM)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._deliver_pending()

    def allow(self) -> None:
        """From here on a Ctrl-C may interrupt; one that waited does so now."""
        self._listen_to_workers()
        self._allowed = True
        if not self._delivered:
            self._deliver_pending()

    def hold(self) -> None:
        """From here on a Ctrl-C waits."""
        self._allowed = False
        self._listen_to_workers()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """``allow`` on entering, ``hold`` on leaving."""
        self.allow()
        try:
            yield
        finally:
            self.hold()

    def _take_over(self, number: int) -> None:
        previous = signal.getsignal(number)
        # SIGTERM's default is no function of Python's; a signal that is ignored stays ignored.
        if callable(previous) or (number == signal.SIGTERM and previous == signal.SIG_DFL):
            self._previous[number] = previous
            signal.signal(number, self._handle)

    def _listen_to_workers(self) -> None:
        # torch puts its handler in place when it starts the first workers, perhaps only now.
        if self._in_main_thread and signal.SIGCHLD not in self._previous:
            self._take_over(signal.SIGCHLD)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCHLD and handles_temporary_file(frame):
            self._pending[number] = frame
        elif number == signal.SIGCHLD:
            self._later(number, frame)
        elif self._graceful and self.stop_signal is None:
            self.stop_signal = signal.Signals(number).name
        elif number == signal.SIGTERM:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
        else:
            self._later(number, frame)

    def _later(self, number: int, frame: FrameType | None) -> None:
        """Now, if it is allowed."""
        self._pending[number] = frame
        if self._allowed and not self._delivered:
            self._deliver_pending()

    def _deliver_pending(self) -> None:
        while pending := sorted(self._pending):
            number = pending[0]  # a Ctrl-C before what is said of a worker
            try:
                frame = self._pending.pop(number)
            except KeyError:  # delivered by the handler of a signal that came just now
                continue
            try:
                self._previous[number](number, frame)
            except BaseException as error:
                if self.stop_signal is not None and is_death_of_worker(error):
                    continue
                self._delivered = True
                raise


def handles_temporary_file(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals is vars(tempfile):
            return True
        frame = frame.f_back
    return False
