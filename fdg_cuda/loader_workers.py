"""Processes that make batches ahead: torch's DataLoader, kept from one epoch to the next."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, dataloader

PREFETCH = 2  # batches each worker makes ahead
Place = tuple[int, int]  # epoch and batch within it, both 0-based


class _Places(Sampler[Place]):
    """Which batches are wanted next. They are told by epoch and number, since workers that stay have
    no other way to learn which epoch it is."""

    def __init__(self) -> None:
        self.now: Sequence[Place] = ()

    def __iter__(self) -> Iterator[Place]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


class WorkerTeam:
    """Processes for one pass over batches at a time; they stay from one pass to the next.

    They are started by the first pass, the way torch starts workers where this runs (Linux: fork, up
    to Python 3.13; a data set is then shared, not copied). A fork takes no other thread along, and
    one that held a lock at that moment would leave it locked. Here it does no harm: ``fit`` asks for
    an epoch's batches while it is drained, when the threads of its stages wait and hold none, and
    what workers do takes none of theirs. ``forkserver`` and ``spawn`` would ask of every user's
    script that its main part be guarded, and of every start some seconds to import torch anew.

    Args:
        batches: gives the batch of a :data:`Place`.
        workers: how many, at least 1.
        pin_memory: whether a thread beside them puts batches into page-locked memory.
    """

    def __init__(self, batches: Dataset[Any], workers: int, *, pin_memory: bool) -> None:
        self._places = _Places()
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=self._places,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            pin_memory=pin_memory,
            persistent_workers=True,
            worker_init_fn=_listen_to_parent_only,
            generator=torch.Generator(),  # or torch's own would move by a number
        )
        self._iterator: Any = None

    def run(self, places: Sequence[Place]) -> Iterator[Any]:
        """The batches of ``places``, in that order; once this is called they are being made."""
        self._places.now = places
        with _stop_signals_blocked():
            self._iterator = iter(self._loader)
        return self._iterator  # type: ignore[no-any-return]

    @property
    def whole(self) -> bool:
        """Whether every process that was started still lives."""
        return self._iterator is None or all(w.is_alive() for w in self._iterator._workers)

    def close(self) -> None:
        """End the processes; returns when they have ended. (Without it they end with this object.)"""
        if self._iterator is not None:
            # No public name does this; left to the garbage collector it would wait for whoever keeps
            # an exception and with it the frames that refer to the iterator.
            self._iterator._shutdown_workers()
            self._iterator = None


def end_workers_of(iterator: object) -> None:
    """End the processes of a torch ``DataLoader``'s iterator, unless they belong to the loader.

    Left to the garbage collector they would stay as long as an exception whose traceback leads to the
    iterator, and then make it wait some seconds for each.
    """
    if isinstance(iterator, dataloader._MultiProcessingDataLoaderIter) and not (
        iterator._persistent_workers
    ):
        iterator._shutdown_workers()


# A Ctrl-C goes to all processes of a terminal, the SIGTERM of a service manager to all of a service.
# But whether and when training stops is decided by the process that trains, which may want batches, or
# a test, until then. Where a process cannot learn who sent a SIGTERM (macOS) it stays as it is: Python
# must be able to end workers by one.
KNOWS_SENDER = hasattr(signal, "sigwaitinfo")
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM} if KNOWS_SENDER else {signal.SIGINT}


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Stop signals wait until the end of the block, and never reach processes started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen_to_parent_only(worker: int) -> None:
    """In a worker: a SIGTERM ends it only if its parent sent it, as Python does at its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if KNOWS_SENDER:
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
