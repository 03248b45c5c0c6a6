"""Files that take their place in one step, and survive a power cut if asked to. No torch."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place in one step if the block succeeds.

    So a reader, or a run that is stopped, never meets half a file. The block writes to the
    temporary file (which exists already) and closes it; should the block fail, it is removed. What
    killed processes left beside ``path`` is removed first.

    Args:
        path: the file to be.
        durable: the file is on the disk, not only in the cache of the operating system, before
            this returns, and was before it took its place.

    Raises:
        OSError: the file cannot be written; what was there before still is. Its ``filename`` is
            ``path`` where it was none (a full disk is met by a write, which knows no name).
    """
    remove_stale(path.parent, glob.escape(path.name))
    with _said_of(path):
        temporary, descriptor = _locked_temporary(path)
        try:
            yield temporary
            if durable:
                os.fsync(descriptor)
            os.replace(temporary, path)
            if durable:
                sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove the temporary files of killed processes for files whose name fits ``pattern``.

    A temporary file is locked as long as the process that writes it lives, and no longer; other
    than a process number, a lock is never mistaken for that of a later process.
    """
    for temporary in folder.glob(f".{pattern}.*.part"):
        with suppress(OSError):  # locked: in use; gone: someone else was faster
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(descriptor)


def make_durable_folder(folder: Path) -> None:
    """Make ``folder`` and its parents where they are missing; a power cut does not unmake them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no fsync of folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError without a name, or with that of its temporary file."""
    try:
        yield
    except OSError as error:
        name = os.path.basename(error.filename) if isinstance(error.filename, str) else ""
        is_temporary = name.startswith(f".{path.name}.") and name.endswith(".part")
        if error.errno is not None and (error.filename is None or is_temporary):
            error.filename = str(path)
            del error.filename2  # None would be shown
        raise


def _locked_temporary(path: Path) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # no locks on this file system: then nothing is ever taken as stale
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        # Another process took it for stale between its creation and the lock.
        os.close(descriptor)
