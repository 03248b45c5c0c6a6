"""What a model is planned for: devices of this machine, or hardware that is described."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fdg_cuda.cpu_threads import share_of_cores
from fdg_cuda.devices import Device, parse_devices
from fdg_cuda.hardware_file import Hardware, read_hardware


@dataclass(frozen=True)
class Places:
    """Where stages are to be, and where layers are measured.

    Attributes:
        devices: names, for as many stages as there can be.
        here: devices of this machine; all of them, or the one to measure on.
        hardware: what is described in place of them.
    """

    devices: Sequence[str]
    here: Sequence[torch.device]
    hardware: Hardware | None

    @property
    def share_cores(self) -> bool:
        """Whether more stages have less of the processor each."""
        return self.hardware is None and self.here[0].type == "cpu"

    @property
    def fastest_speed(self) -> float:
        """Of the fastest device that is described, in times the first one's."""
        if self.hardware is None:
            return 1.0
        speeds = [device.speed for device in self.hardware.devices]
        return max(speeds) / speeds[0]


def find_places(
    devices: Sequence[Device] | None, hardware: Hardware | str | os.PathLike[str] | None
) -> Places:
    if hardware is None:
        here = parse_devices(_all_devices() if devices is None else devices)
        return Places([str(device) for device in here], here, None)
    if devices is not None:
        raise ValueError(
            "devices are those of this machine and hardware describes others; give one of them"
        )
    described = hardware if isinstance(hardware, Hardware) else read_hardware(hardware)
    names = [device.name for device in described.devices]
    return Places(names, parse_devices(_all_devices())[:1], described)


def _all_devices() -> list[Device]:
    if torch.cuda.is_available():
        return list(range(torch.cuda.device_count()))
    return ["cpu"] * share_of_cores(None, 1)
