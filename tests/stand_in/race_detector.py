"""Tells the stand-in's race detector (``races.h``) what torch reads and writes, and where."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fdg_cuda
from fdg_cuda import _core

PACKAGE = str(Path(fdg_cuda.__file__).parent)
HOST, DEFAULT_STREAM = _core.STAND_IN_HOST, _core.STAND_IN_DEFAULT_STREAM
Ranges = list[tuple[int, int]]

# They allocate without writing.
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# The host has their result, so it waited for the stream.
WAITING = {"_local_scalar_dense", "equal"}


class RaceDetector(TorchDispatchMode):
    """Within it every operation of torch is an operation of the stream torch works on.

    Storages are kept alive until nothing else holds them, so that no address is used again before
    the detector was told that its memory was given back. Two devices share the default stream here.
    What reads memory without an operation (``tolist``, ``numpy``) is not seen, except for
    :meth:`pinned` memory: whoever takes a view of that, outside any stream, is taken to read it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream = DEFAULT_STREAM
        self._doing = "outside any stream"
        self._pinned: set[int] = set()
        # Storages by their address in C++, with where their memory begins.
        self._held: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def __enter__(self) -> RaceDetector:
        _core.stand_in_watch_for_races(True)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _core.stand_in_watch_for_races(False)
        self._held.clear()

    @contextmanager
    def working_on(self, stream: int) -> Iterator[None]:
        """What torch does goes to ``stream``."""
        before = self._stream, self._doing
        self._give_back()
        self._stream, self._doing = stream, _caller()
        try:
            yield
        finally:
            self._give_back()
            self._stream, self._doing = before

    def pinned(self, memory: Tensor) -> Tensor:
        """``memory`` is page-locked: the host's own, and nobody's stream."""
        storage = memory.untyped_storage()
        key = storage._cdata
        if key in self._held:
            _core.stand_in_given_back(self._held[key][1])
        self._hold(storage, HOST)
        self._pinned.add(key)
        return memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read: list[Tensor] = []
        written: list[Tensor] = []
        for place, (name, is_written) in enumerate(_arguments(func)):
            value = args[place] if place < len(args) else kwargs.get(name)
            (written if is_written else read).extend(_tensors(value))
        ranges = [self._ranges(tensors, self._stream) for tensors in (read, written)]
        result = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in (*read, *written)}
        fresh, aliases = [], []
        for output in _tensors(result):
            (aliases if output.untyped_storage()._cdata in known else fresh).append(output)
        made = self._ranges(fresh, self._stream)
        operation = func._schema.name.partition("::")[2]
        if self._stream == DEFAULT_STREAM and not self._pinned.isdisjoint(known):
            self._touch_pinned(operation, read, written, aliases)
        elif operation not in ALLOCATING and (made or ranges[1] or not aliases):
            # Those want to know only how a tensor is laid out.
            reads = [] if operation.endswith("_like") or operation.startswith("new_") else ranges[0]
            name = f"{operation} ({self._doing})"
            _core.stand_in_touch(self._stream, reads, ranges[1] + made, name)
        if operation in WAITING:
            _core.stand_in_host_waited_for_stream(self._stream)
        return result

    def _touch_pinned(
        self, operation: str, read: list[Tensor], written: list[Tensor], aliases: list[Tensor]
    ) -> None:
        self._give_back()
        if aliases and not written:
            read = aliases
        pinned = [
            self._ranges([t for t in tensors if t.untyped_storage()._cdata in self._pinned], HOST)
            for tensors in (read, written)
        ]
        _core.stand_in_touch(HOST, *pinned, f"{operation} ({_caller()})")

    def _ranges(self, tensors: list[Tensor], owner: int) -> Ranges:
        found: Ranges = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            held = self._held.get(storage._cdata)
            if held is None:
                self._hold(storage, owner)
            elif held[1] != storage.data_ptr():  # it was resized
                _core.stand_in_given_back(held[1])
                self._hold(storage, owner)
            found += _places(tensor)
        return found

    def _hold(self, storage: torch.UntypedStorage, owner: int) -> None:
        begin = storage.data_ptr()
        _core.stand_in_allocated(begin, storage.nbytes(), owner)
        self._held[storage._cdata] = storage, begin

    def _give_back(self) -> None:
        """Let go of what nothing else holds."""
        for key in [k for k in self._held if torch._C._storage_Use_Count(k) == 1]:
            _, begin = self._held.pop(key)
            _core.stand_in_given_back(begin)
            self._pinned.discard(key)


@cache
def _arguments(func: Any) -> list[tuple[str, bool]]:
    """The names of the arguments of an operation, and whether it writes them."""
    return [
        (argument.name, argument.alias_info is not None and argument.alias_info.is_write)
        for argument in func._schema.arguments
    ]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors with memory in what an operation takes or returns."""
    if isinstance(value, Tensor):
        has_memory = value.layout == torch.strided and value.device.type == "cpu"
        return [value] if has_memory and not value._is_zerotensor() and value.numel() else []
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _places(tensor: Tensor) -> Ranges:
    """Where the elements lie, without the gaps between them."""
    begin, run = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return [(begin, begin + run * tensor.numel())]
    outer = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        step = stride * tensor.element_size()
        if size == 1 or step == 0:
            continue
        if step <= run and not outer:  # next to one another, or overlapping
            run += step * (size - 1)
        else:
            outer.append((step, size))
    starts = [begin]
    for step, size in outer:
        starts = [start + step * i for start in starts for i in range(size)]
    return [(start, start + run) for start in starts]


def _caller() -> str:
    """Where in the package torch is asked to do something, for the reader of a violation."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and code.co_name not in ("enqueuing", "__enter__"):
            batch = frame.f_locals.get("batch")
            of_batch = f" of batch {batch}" if isinstance(batch, int) else ""
            return f"{Path(code.co_filename).name}:{frame.f_lineno}, {code.co_name}{of_batch}"
        frame = frame.f_back
    return "a test"
