"""Which devices a runner can put stages on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fdg_cuda import _core
from fdg_cuda.accelerator import accelerator

NO_CUDA_PART = (
    "this installation of fdg_cuda has no CUDA part: it was built with FDG_CUDA=0, or where no nvcc was "
    "found. Install the CUDA toolkit and, in the source folder, build again: "
    "FDG_CUDA=1 pip install --force-reinstall --no-deps ."
)

Device = int | str | torch.device


def as_argument(devices: Sequence[int | str]) -> str:
    """How ``devices`` are given in Python."""
    return f"devices={list(devices)}"


def parse_devices(
    devices: Sequence[Device], written: Callable[[Sequence[int | str]], str] = as_argument
) -> list[torch.device]:
    """One torch device per stage; integers are CUDA ordinals.

    Args:
        devices: the caller's.
        written: how a message writes devices that would do.

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
    if kinds == {"cuda"}:
        _check_cuda(parsed, written)
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
        return torch.device("cuda", parsed.index or 0)
    if parsed.type != "cpu":
        raise ValueError(
            f"device {device!r} is not supported; use 'cpu', or a CUDA ordinal such as 0"
        )
    return parsed


def _check_cuda(
    devices: Sequence[torch.device], written: Callable[[Sequence[int | str]], str]
) -> None:
    count = accelerator().count()
    missing = next((device for device in devices if device.index >= count), None)
    if missing is not None and count > 0:
        raise ValueError(
            f"device {missing.index} is not there: this machine has {count} CUDA devices, numbered from "
            f"0 to {count - 1}. A device may be named more than once: {written([0] * len(devices))}"
        )
    has_cuda_part = "cuda" in _core.backends
    if missing is not None:
        also = "" if has_cuda_part else " This installation of fdg_cuda has no CUDA part either."
        raise ValueError(
            f"device {missing.index} is a CUDA device, but torch sees none here; "
            f"`python -m fdg_cuda doctor` says why.{also} For stages on the processor: "
            f"{written(['cpu'] * len(devices))}"
        )
    if not has_cuda_part:
        raise ValueError(f"device {devices[0].index}: {NO_CUDA_PART}; or use 'cpu'")
