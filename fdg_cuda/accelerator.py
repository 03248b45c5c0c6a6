"""What torch does for the CUDA backend: the one module that calls ``torch.cuda``.

Everything else of the backend asks :func:`accelerator` for it, so that tests can put a stand-in in
its place on machines without a GPU.
"""

from __future__ import annotations

import contextlib
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
    def lane(self, ordinal: int, handle: int) -> Lane:
        """The stream ``handle`` (a ``cudaStream_t``) for torch to work on."""

    @abstractmethod
    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        """Within it torch enqueues on ``lane`` and allocates for it."""

    @abstractmethod
    def synchronize(self, ordinal: int) -> None:
        """Wait for everything on the device. Never while ticks run."""

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
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    @property
    def handle(self) -> int:
        return int(self._graph.raw_cuda_graph_exec())

    def replay(self) -> None:
        self._graph.replay()


class TorchCuda(Accelerator):
    """The real thing."""

    def count(self) -> int:
        return torch.cuda.device_count()

    def device(self, ordinal: int) -> torch.device:
        return torch.device("cuda", ordinal)

    def name(self, ordinal: int) -> str:
        return torch.cuda.get_device_name(ordinal)

    def lane(self, ordinal: int, handle: int) -> Lane:
        return torch.cuda.ExternalStream(handle, device=ordinal)  # type: ignore[no-untyped-call]

    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        return torch.cuda.stream(lane)

    def synchronize(self, ordinal: int) -> None:
        torch.cuda.synchronize(ordinal)

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
        state = self.random_state(ordinal)
        # Memory that is free now may be needed in the pool.
        torch.cuda.synchronize(ordinal)
        torch.cuda.empty_cache()
        try:
            with torch.cuda.stream(lane):
                # "thread_local": a DataLoader's thread that pins memory must not end the capture.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    function()
                except BaseException:
                    with contextlib.suppress(Exception):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._end_failed_capture(ordinal, state)
            raise
        return _TorchGraph(graph)

    def release(self) -> None:
        torch.cuda.empty_cache()

    @staticmethod
    def _end_failed_capture(ordinal: int, state: Tensor) -> None:
        """After a capture that did not end well torch's generator still believes it is in one, and
        refuses random numbers: give it a state of its own again."""
        fresh = torch.Generator(device=torch.device("cuda", ordinal))
        fresh.set_state(state)
        torch.cuda.default_generators[ordinal].graphsafe_set_state(fresh.graphsafe_get_state())


_current: Accelerator = TorchCuda()


def accelerator() -> Accelerator:
    """What the CUDA backend runs on."""
    return _current


def use_accelerator(other: Accelerator) -> None:
    """Run the CUDA backend on ``other``: for tests."""
    global _current
    _current = other
