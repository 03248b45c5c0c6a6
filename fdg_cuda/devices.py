"""Which devices a runner can put stages on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fdg_cuda import _core
from fdg_cuda.accelerator import accelerator

Device = int | str | torch.device


def parse_devices(devices: Sequence[Device]) -> list[torch.device]:
    """One torch device per stage; integers are CUDA ordinals.

    Raises:
        TypeError: not a sequence of devices.
        ValueError: none given, an unknown name, or a device this machine or build cannot use.
    """
    if isinstance(devices, (str, int, torch.device)) or not isinstance(devices, Sequence):
        raise TypeError(
            f"devices must be a list with one entry per stage, such as [0, 1, 2] or "
            f"['cpu', 'cpu']; got {devices!r}"
        )
    if not devices:
        raise ValueError("devices is empty; give one entry per stage, such as ['cpu', 'cpu']")
    parsed = [_parse(device) for device in devices]
    kinds = {device.type for device in parsed}
    if len(kinds) > 1:
        raise ValueError(
            f"devices mixes {' and '.join(sorted(kinds))} devices ({', '.join(map(str, parsed))}); a "
            f"runner's stages are all on CUDA devices or all on the CPU"
        )
    return parsed


def _parse(device: Device) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise TypeError(
            f"a device is a CUDA ordinal (0), a name ('cpu', 'cuda:1') or a torch.device; got "
            f"{device!r}"
        )
    try:
        parsed = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"unknown device {device!r}; use 'cpu', or a CUDA ordinal such as 0"
        ) from None
    if parsed.type == "cuda":
        count = accelerator().count()
        if (parsed.index is not None and not 0 <= parsed.index < max(count, 1)) or count == 0:
            have = f"this machine has {count} CUDA devices" if count else "there is none here"
            raise ValueError(
                f"device {device!r} asks for a CUDA device, but {have}. Name 'cpu' once per stage for "
                f"stages on the processor"
            )
        if "cuda" not in _core.backends:
            raise ValueError(
                f"device {device!r}: this installation of fdg_cuda has no CUDA part, since no nvcc was "
                f"found when it was built. Install the CUDA toolkit and build again with FDG_CUDA=1 "
                f"pip install --force-reinstall --no-deps ., or use 'cpu'"
            )
        return torch.device("cuda", parsed.index or 0)
    if parsed.type != "cpu":
        raise ValueError(
            f"device {device!r} is not supported; use 'cpu', or a CUDA ordinal such as 0"
        )
    return parsed
