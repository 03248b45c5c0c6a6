"""The kind of machine that a runner's devices ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fdg_cuda.machine import CpuMachine, Machine
from fdg_cuda.schedule import Schedule


def make_machine(
    devices: Sequence[torch.device],
    schedule: Schedule,
    *,
    stash: bool,
    cpu_threads: int | None,
    graphs: str | bool,
) -> Machine:
    """The machine of ``devices``, which are all of one kind.

    Raises:
        ValueError: an argument that cannot be, or makes no sense for this kind of device.
    """
    if graphs != "auto" and not isinstance(graphs, bool):
        raise ValueError(f"graphs must be 'auto', True or False; got {graphs!r}")
    if devices[0].type == "cpu":
        if graphs is True:
            raise ValueError("graphs=True asks for CUDA graphs, but the devices are CPUs")
        return CpuMachine(schedule, stash=stash, cpu_threads=cpu_threads)
    if cpu_threads is not None:
        raise ValueError("cpu_threads is for stages on the CPU; these devices are CUDA ones")
    from fdg_cuda.cuda_machine import CudaMachine

    return CudaMachine(schedule, [device.index for device in devices], stash=stash, graphs=graphs)
