"""Time on a device: between two marks that its streams pass."""

from __future__ import annotations

import time
from typing import Any

import torch


class Deadline:
    """So many seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; below 0 when it has passed."""
        return self._end - time.monotonic()

    def within(self, seconds: float) -> Deadline:
        """The earlier one of this and ``seconds`` from now."""
        return Deadline(min(seconds, self.left))


class DeviceClock:
    """Marks on a stream of a CUDA device; on the CPU, whose work is done when a call returns, the time.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"

    def mark(self, stream: Any = None) -> Any:
        """A mark behind what was enqueued on ``stream`` (the current one) so far."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two marks; waits for the second."""
        if not self.is_cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def stream(self, handle: int) -> Any:
        """The ``cudaStream_t`` ``handle`` as torch knows it."""
        return torch.cuda.ExternalStream(handle, device=self.device)

    def reserved_bytes(self, *, peak: bool = False) -> int:
        """Device memory that torch holds, or the most it held since :meth:`forget`."""
        if not self.is_cuda:
            return 0
        read = torch.cuda.max_memory_reserved if peak else torch.cuda.memory_reserved
        return int(read(self.device))

    def forget(self) -> None:
        """Give free memory back, and begin a new peak."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
