"""What torch does for the CUDA backend: the one module that calls ``torch.cuda``.

Everything else of the backend asks :func:`accelerator` for it, so that tests can put a stand-in in
its place on machines without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Lane = Any  # a stream as torch knows it


class Graph(ABC):
    """Captured work, to be replayed on the stream it was captured on."""

    @property
    @abstractmethod
    def handle(self) -> int:
        """The instantiated graph, a ``cudaGraphExec_t``."""

    @abstractmethod
    def replay(self) -> None:
        """Replay it on the current stream, with random numbers of its own each time."""


class Accelerator(ABC):
    """Devices, streams and graphs. Devices are ordinals."""

    @abstractmethod
    def count(self) -> int:
        """How many devices there are."""

    @abstractmethod
    def device(self, ordinal: int) -> torch.device:
        """Where tensors of device ``ordinal`` lie."""

    @abstractmethod
    def name(self, ordinal: int) -> str:
        """What the device is, as people and caches of measurements call it."""

    @abstractmethod
    def memory(self, ordinal: int) -> int:
        """The device's memory, in bytes, in use or not."""

    @abstractmethod
    def lane(self, ordinal: int, handle: int) -> Lane:
        """The stream ``handle`` (a ``cudaStream_t``) for torch to work on."""

    @abstractmethod
    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        """Within it torch enqueues on ``lane`` and allocates for it."""

    @abstractmethod
    def synchronize(self, ordinal: int) -> None:
        """Wait for everything on the device. Never while ticks run."""

    @abstractmethod
    def mark(self, ordinal: int) -> Callable[[], None]:
        """What waits on the host until what torch enqueued on the device's current stream up to now
        is done."""

    @abstractmethod
    def pinned(self, size: int) -> Tensor:
        """``size`` bytes of page-locked host memory."""

    @abstractmethod
    def random_state(self, ordinal: int) -> Tensor:
        """Where the device's generator of random numbers stands."""

    @abstractmethod
    def set_random_state(self, ordinal: int, state: Tensor) -> None:
        """Put the generator back to ``state``."""

    @abstractmethod
    def graph_pool(self) -> Any:
        """Memory that only graphs captured with this pool use."""

    @abstractmethod
    def capture(
        self, ordinal: int, lane: Lane, pool: Any, function: Callable[[], Sequence[Tensor]]
    ) -> Graph:
        """What ``function`` enqueues on ``lane``, as a graph; nothing of it runs.

        Args:
            function: returns the tensors that a replay writes anew, in place.

        Raises:
            Exception: whatever the function or the capture raised. The lane is usable again.
        """

    @abstractmethod
    def release(self) -> None:
        """Give memory that nothing uses any more back to the devices."""


class _TorchGraph(Graph):
    def __init__(self, graph: torch.cuda.CUDAGraph, turn: torch.cuda.Event) -> None:
        self._graph = graph
        self._turn = turn

    @property
    def handle(self) -> int:
        return int(self._graph.raw_cuda_graph_exec())

    def replay(self) -> None:
        # torch puts seed and offset into memory that all graphs of a device share, before it launches
        # the graph: one replay must be done with them before the next one writes.
        stream = torch.cuda.current_stream()
        stream.wait_event(self._turn)
        self._graph.replay()
        self._turn.record(stream)


class TorchCuda(Accelerator):
    """The real thing."""

    def __init__(self) -> None:
        self._turns: dict[int, torch.cuda.Event] = {}  # [device] see _TorchGraph.replay
        self._failed: list[torch.cuda.CUDAGraph] = []

    def count(self) -> int:
        return torch.cuda.device_count()

    def device(self, ordinal: int) -> torch.device:
        return torch.device("cuda", ordinal)

    def name(self, ordinal: int) -> str:
        return torch.cuda.get_device_name(ordinal)

    def memory(self, ordinal: int) -> int:
        return int(torch.cuda.mem_get_info(ordinal)[1])

    def lane(self, ordinal: int, handle: int) -> Lane:
        return torch.cuda.ExternalStream(handle, device=ordinal)  # type: ignore[no-untyped-call]

    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        return torch.cuda.stream(lane)

    def synchronize(self, ordinal: int) -> None:
        torch.cuda.synchronize(ordinal)

    def mark(self, ordinal: int) -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(ordinal))
        return event.synchronize

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def random_state(self, ordinal: int) -> Tensor:
        return torch.cuda.get_rng_state(ordinal)

    def set_random_state(self, ordinal: int, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, ordinal)

    def graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(
        self, ordinal: int, lane: Lane, pool: Any, function: Callable[[], Sequence[Tensor]]
    ) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Memory that is free now may be needed in the pool.
        torch.cuda.synchronize(ordinal)
        torch.cuda.empty_cache()
        collecting = gc.isenabled()
        gc.disable()  # garbage that frees device memory would end the capture
        try:
            with torch.cuda.stream(lane):
                self._capture_on_current_stream(graph, ordinal, pool, function)
                turn = self._turns.setdefault(ordinal, torch.cuda.Event())  # type: ignore[no-untyped-call]
                turn.record(lane)
        finally:
            if collecting:
                gc.enable()
        return _TorchGraph(graph, turn)

    def _capture_on_current_stream(
        self,
        graph: torch.cuda.CUDAGraph,
        ordinal: int,
        pool: Any,
        function: Callable[[], Sequence[Tensor]],
    ) -> None:
        try:
            # "thread_local": a DataLoader's thread that pins memory must not end the capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            function()
        except BaseException:
            with contextlib.suppress(Exception):  # what the function raised says more
                self._end_capture(graph, ordinal, pool)
            raise
        self._end_capture(graph, ordinal, pool)

    def _end_capture(self, graph: torch.cuda.CUDAGraph, ordinal: int, pool: Any) -> None:
        try:
            graph.capture_end()
        except BaseException:
            self._clean_up_failed_capture(graph, ordinal, pool)
            raise

    def _clean_up_failed_capture(
        self, graph: torch.cuda.CUDAGraph, ordinal: int, pool: Any
    ) -> None:
        """Where ending a capture raises, torch 2.11 leaves three things as if it still went on: its
        allocator, a filter of that allocator which points into the graph, and its generator."""
        self._failed.append(graph)  # for the filter, for good
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(RuntimeError, AttributeError):
                getattr(torch._C, name)(ordinal, pool)
        # A capture that ends well takes the generator out of the failed one.
        with contextlib.suppress(RuntimeError):
            something = torch.zeros(1, device=self.device(ordinal))
            torch.cuda.current_stream().synchronize()
            again = torch.cuda.CUDAGraph()
            again.capture_begin(capture_error_mode="thread_local")
            something.add_(1)
            again.capture_end()

    def release(self) -> None:
        # One for each stream there ever was, otherwise.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()


_current: Accelerator = TorchCuda()


def accelerator() -> Accelerator:
    """What the CUDA backend runs on."""
    return _current


def use_accelerator(other: Accelerator) -> None:
    """Run the CUDA backend on ``other``: for tests."""
    global _current
    _current = other
