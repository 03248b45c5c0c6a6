"""Processes that take turns: whatever is compared lives in processes of its own, warm.

A slow moment of the machine then meets all sides, and none finds the others' memory or threads. While
one has its turn the others sleep in a read of their pipe; how much they computed all the same is in
every answer, so that nobody has to believe it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

Turn = Callable[..., Any]
Make = Callable[[], Turn]

STOP_SECONDS = 10.0


class PlayerError(Exception):
    """Why a player cannot go on, in one line."""


@dataclass(frozen=True)
class Answer:
    """What one process of a player says after a turn.

    Attributes:
        value: what the turn returned.
        idle_seconds: since its turn before.
        idle_cpu_seconds: of processor time, by all its threads, meanwhile.
        peak_bytes: its peak resident memory so far, libraries included (Linux: VmHWM).
    """

    value: Any
    idle_seconds: float
    idle_cpu_seconds: float
    peak_bytes: int


class Player:
    """One side, in a process for each of ``makes``, which are called there and return what a turn does.

    The processes begin to import at once; what they make they make in :meth:`get_ready`.

    Args:
        makes: picklable.
        limit: seconds after which it is given up for hung, when it gets ready and in each turn.
        environment: further variables of the processes' environment.
    """

    def __init__(
        self, makes: Sequence[Make], limit: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._limit = limit
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        context = mp.get_context("spawn")
        for make in makes:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(make, there), daemon=True)
            with _environment(environment or {}):
                process.start()
            there.close()  # or the end of the process would not end the pipe
            self._processes.append(process)
            self._pipes.append(here)

    def get_ready(self) -> None:
        """Make what the turns need.

        Raises:
            PlayerError: it cannot; its processes are gone.
        """
        self._ask(())

    def turn(self, *arguments: Any) -> list[Answer]:
        """An answer of each process, which does its turn with these arguments.

        Raises:
            PlayerError: it cannot; its processes are gone.
        """
        return self._ask(arguments)

    def stop(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it has ended by itself
                pipe.send(None)
        give_up = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            process.join(max(0.0, give_up - time.monotonic()))
        self._kill()

    def _ask(self, arguments: tuple[Any, ...]) -> list[Any]:
        answers: dict[Connection, Any] = {}
        give_up = time.monotonic() + self._limit
        try:
            for pipe in self._pipes:
                pipe.send(arguments)
            while len(answers) < len(self._pipes):
                waiting = [pipe for pipe in self._pipes if pipe not in answers]
                ready = wait(waiting, max(0.0, give_up - time.monotonic()))
                if not ready:
                    raise PlayerError(f"no answer within {self._limit:g} s")
                for pipe in waiting:
                    if pipe in ready:
                        assert isinstance(pipe, Connection)
                        answer = pipe.recv()
                        if isinstance(answer, PlayerError):
                            raise answer
                        answers[pipe] = answer
        except PlayerError:
            self._kill()
            raise
        except (EOFError, OSError):
            for process in self._processes:
                process.join(1.0)
            codes = [str(process.exitcode) for process in self._processes if not process.is_alive()]
            self._kill()
            raise PlayerError(f"a process ended by itself, exit code {', '.join(codes)}") from None
        return [answers[pipe] for pipe in self._pipes]

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


@contextmanager
def _environment(further: Mapping[str, str]) -> Iterator[None]:
    """What is started inside gets ``further`` from the first; what a library reads once, say."""
    before = dict(os.environ)
    os.environ.update(further)
    try:
        yield
    finally:
        for name in further.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _serve(make: Make, pipe: Connection) -> None:
    # A terminal sends Ctrl-C to all; only the caller can tell what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if pipe.recv() is None:
            return
        turn = make()
        pipe.send(None)
        idle_since, cpu_then = time.perf_counter(), time.process_time()
        while (arguments := pipe.recv()) is not None:
            idle = time.perf_counter() - idle_since
            idle_cpu = time.process_time() - cpu_then
            value = turn(*arguments)
            pipe.send(Answer(value, idle, idle_cpu, resident_bytes("VmHWM")))
            idle_since, cpu_then = time.perf_counter(), time.process_time()
    except EOFError:
        pass  # nobody asks any more
    except Exception as error:
        pipe.send(PlayerError(first_line(error)))
        # Not gone yet: what a second process would say about the loss of this one explains nothing.
        pipe.poll(None)


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of its message, for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at most so far) of this process, shared libraries included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only")
