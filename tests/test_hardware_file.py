"""Hardware described in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdg_cuda.hardware_file import read_hardware

GOOD = """
[link]
gigabytes_per_second = 50
latency_microseconds = 5

[[devices]]
name = "large"
count = 2
memory_gigabytes = 80
speed = 1.5

[[devices]]
name = "small"
"""


def test_devices_and_the_link_between_them(tmp_path: Path) -> None:
    (tmp_path / "hardware.toml").write_text(GOOD)
    hardware = read_hardware(tmp_path / "hardware.toml")
    first, second, third = hardware.devices
    assert (first.speed, second.speed, third.speed) == (1.5, 1.5, 1.0)
    # A tenth is left to what stages need beside their tensors.
    assert first.memory_bytes == second.memory_bytes == 72_000_000_000
    assert third.memory_bytes is None
    assert len({first.name, second.name, third.name}) == 3, "one name would be one memory"
    assert hardware.link.seconds(50_000_000) == pytest.approx(1e-3 + 5e-6)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("", ["1 mistake", "'devices' must be a list with a table for each kind of device"]),
        ("devices = 3", ["'devices' must be a list"]),
        ("device = 3", ["'device' is neither link nor devices. Did you mean 'devices'?"]),
        ("[[devices]]\nsped = 2", ["devices[0]: 'sped' is unknown. Did you mean 'speed'?"]),
        (
            "link = 3\n[[devices]]\nspeed = 0\ncount = 0\nmemory_gigabytes = 'a'",
            [
                "4 mistakes",
                "'link' must be a table; got int",
                "devices[0]: 'speed' takes a number above 0; got 0",
                "'count' takes a whole number of at least 1; got 0",
                "'memory_gigabytes' takes a number above 0; got 'a'",
            ],
        ),
    ],
)
def test_mistakes_are_named_all_at_once(tmp_path: Path, content: str, messages: list[str]) -> None:
    (tmp_path / "hardware.toml").write_text(content)
    with pytest.raises(ValueError, match=r"hardware\.toml has") as error:
        read_hardware(tmp_path / "hardware.toml")
    for message in messages:
        assert message in str(error.value)
