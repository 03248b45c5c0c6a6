"""Devices and the ways between them, as far as where to cut depends on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DeviceSpec:
    """A device for one stage. Stages on devices of one name share its memory.

    Attributes:
        memory_bytes: that the stages may use; None: no limit.
        speed: times as fast as the device that costs were measured on.

    Raises:
        ValueError: a speed or memory that cannot be.
    """

    name: str
    memory_bytes: int | None = None
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.speed) and self.speed > 0):
            raise ValueError(
                f"{self.name}: speed must be a finite number above 0; got {self.speed}"
            )
        if self.memory_bytes is not None and self.memory_bytes < 0:
            raise ValueError(
                f"{self.name}: memory_bytes must be at least 0, or None for no limit; got "
                f"{self.memory_bytes}"
            )


@dataclass(frozen=True)
class Link:
    """How two neighbouring stages reach each other, the same way up and down. By default at once.

    Raises:
        ValueError: a bandwidth or latency that cannot be.
    """

    bytes_per_second: float = math.inf
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise ValueError(
                f"bytes_per_second of a link must be above 0; got {self.bytes_per_second}"
            )
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(
                f"latency_s of a link must be a finite number of seconds, at least 0; got "
                f"{self.latency_s}"
            )

    def seconds(self, nbytes: Any) -> Any:
        """To send so many bytes, a number or an array of them; nothing takes no time."""
        return (nbytes > 0) * self.latency_s + nbytes / self.bytes_per_second
