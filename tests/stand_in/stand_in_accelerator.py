"""What torch does on a CUDA device, done on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from race_detector import RaceDetector
from torch import Tensor

from fdg_cuda import _core
from fdg_cuda.accelerator import Accelerator, Graph, Lane


def _raise_if_lost() -> None:
    """As torch does on a device that was lost."""
    state = _core.stand_in_state()
    if state.lost and state.failed:
        raise RuntimeError("CUDA error: cudaErrorIllegalAddress, as torch says it; start it again")


class _StandInGraph(Graph):
    def __init__(self, replay: Callable[[], None]) -> None:
        self._replay = replay
        self._handle = _core.stand_in_make_graph(replay)

    def __del__(self) -> None:
        _core.stand_in_destroy_graph(self._handle)

    @property
    def handle(self) -> int:
        return self._handle

    def replay(self) -> None:
        self._replay()


class StandIn(Accelerator):
    """Three devices whose memory is the host's. A replay does what was captured again, into the
    memory the capture was given.

    Args:
        races: is told where torch works.

    Attributes:
        refuses: asked before each capture; an exception it returns is raised half-way through it.
        captures: how many graphs were captured.
        memory_bytes: what each device is said to have.
    """

    def __init__(self, races: RaceDetector | None = None) -> None:
        self._races = races
        self.refuses: Callable[[int], Exception | None] = lambda capture: None
        self.captures = 0
        self.memory_bytes = 16 << 30

    def count(self) -> int:
        return 3

    def device(self, ordinal: int) -> torch.device:
        return torch.device("cpu")

    def name(self, ordinal: int) -> str:
        return f"stand-in {ordinal}"

    def memory(self, ordinal: int) -> int:
        return self.memory_bytes

    def lane(self, ordinal: int, handle: int) -> Lane:
        return ordinal, handle

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        _raise_if_lost()
        ordinal, handle = lane
        before = _core.stand_in_current_device()
        _core.stand_in_set_device(ordinal)
        _core.stand_in_check_stream(handle)
        try:
            with self._races.working_on(handle) if self._races else nullcontext():
                yield
        finally:
            _core.stand_in_set_device(before)

    def synchronize(self, ordinal: int) -> None:
        _raise_if_lost()
        _core.stand_in_synchronize(ordinal)

    def mark(self, ordinal: int) -> Callable[[], None]:
        _raise_if_lost()
        return lambda: None

    def pinned(self, size: int) -> Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        return self._races.pinned(memory) if self._races else memory

    def random_state(self, ordinal: int) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, ordinal: int, state: Tensor) -> None:
        torch.set_rng_state(state)

    def graph_pool(self) -> Any:
        return object()

    def capture(
        self, ordinal: int, lane: Lane, pool: Any, function: Callable[[], Sequence[Tensor]]
    ) -> Graph:
        self.captures += 1
        with self.on(lane):
            outputs = function()
            refusal = self.refuses(self.captures)
            if refusal is not None:
                raise refusal

        def replay() -> None:
            with self.on(lane), torch.enable_grad():
                for output, anew in zip(outputs, function(), strict=True):
                    if output is not anew:
                        output.data.copy_(anew)  # a device would not count it as a change

        return _StandInGraph(replay)

    def release(self) -> None:
        _raise_if_lost()
