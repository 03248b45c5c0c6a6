"""Hardware that need not be here, described in a small file: TOML, YAML or JSON.

    [link]                       # between neighbours
    gigabytes_per_second = 25
    latency_microseconds = 10

    [[devices]]
    name = "A100"
    count = 4
    memory_gigabytes = 80
    speed = 1.5                  # times the device that layers are measured on

Giga is 1e9. Stages are planned for the devices in this order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.names import did_you_mean
from fdg_cuda.options import Option, option, options_of
from fdg_cuda.settings_file import parse_file
from fdg_cuda.stage_memory import SPARE

GIGA, MICRO = 1e9, 1e-6
PANEL = "Hardware"
ABOVE_ZERO: Any = {
    "takes": "a number above 0",
    "allowed": lambda value: 0 < value < math.inf,
}


@dataclass(frozen=True)
class Hardware:
    """Devices, one per stage, and the link between neighbours."""

    devices: tuple[DeviceSpec, ...]
    link: Link


@dataclass(frozen=True)
class _LinkEntries:
    gigabytes_per_second: float = option(25.0, PANEL, "In each direction.", **ABOVE_ZERO)
    latency_microseconds: float = option(10.0, PANEL, "Of one copy.", least=0)


@dataclass(frozen=True)
class _DeviceEntries:
    name: str = option("device", PANEL, "For people.")
    count: int = option(1, PANEL, "How many of them.", least=1)
    memory_gigabytes: float | None = option(None, PANEL, "No limit if not given.", **ABOVE_ZERO)
    speed: float = option(1.0, PANEL, "Times the device that is measured.", **ABOVE_ZERO)


def read_hardware(path: str | os.PathLike[str]) -> Hardware:
    """What a file describes; see the head of this module.

    Of a device's memory a tenth is left to what stages need beside their tensors.

    Raises:
        ValueError: the file is damaged, or has entries that mean nothing: one message names all.
        OSError: the file cannot be read.
    """
    entries = parse_file(Path(path))
    mistakes: list[str] = []
    for key in entries:
        if key not in ("link", "devices"):
            hint = did_you_mean(str(key), ("link", "devices"))
            mistakes.append(f"{key!r} is neither link nor devices.{hint}")
    link = _accepted(_LinkEntries, entries.get("link", {}), "link", mistakes)
    tables = entries.get("devices")
    if not isinstance(tables, Sequence) or isinstance(tables, str) or not tables:
        mistakes.append("'devices' must be a list with a table for each kind of device.")
        tables = []
    kinds = [
        _accepted(_DeviceEntries, table, f"devices[{number}]", mistakes)
        for number, table in enumerate(tables)
    ]
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ValueError(f"{path} has {count}: {' '.join(mistakes)}")
    specs: list[DeviceSpec] = []
    for kind in kinds:
        specs += [_spec(kind, len(specs) + number) for number in range(kind.count)]
    return Hardware(
        tuple(specs),
        Link(GIGA * link.gigabytes_per_second, MICRO * link.latency_microseconds),
    )


def _spec(kind: _DeviceEntries, number: int) -> DeviceSpec:
    memory = kind.memory_gigabytes
    limit = None if memory is None else int((1 - SPARE) * GIGA * memory)
    # Devices of one name would share their memory.
    return DeviceSpec(f"{kind.name} {number}", limit, kind.speed)


def _accepted(kind: Any, entries: Any, where: str, mistakes: list[str]) -> Any:
    """``entries`` as an instance of ``kind``; what is wrong with them goes to ``mistakes``."""
    if not isinstance(entries, Mapping):
        mistakes.append(f"{where!r} must be a table; got {type(entries).__name__}.")
        return kind()
    table: dict[str, Option] = options_of(kind)
    values = {}
    for key, value in entries.items():
        if key not in table:
            mistakes.append(f"{where}: {key!r} is unknown.{did_you_mean(str(key), table)}")
            continue
        try:
            values[key] = table[key].accept(value)
        except ValueError as error:
            mistakes.append(f"{where}: {key!r} {error}.")
    return kind(**values)
