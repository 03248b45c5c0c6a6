"""The kind of machine that a runner's devices ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.machine import CpuMachine, Machine
from fdg_cuda.precision import Precision
from fdg_cuda.schedule import Schedule


def make_machine(
    devices: Sequence[torch.device],
    schedule: Schedule,
    mode: BackwardWeights,
    *,
    rule: UpdateRule,
    precision: Precision,
    cpu_threads: int | None,
    graphs: str | bool,
) -> Machine:
    """The machine of ``devices``, which are all of one kind.

    Raises:
        ValueError: an argument that cannot be, or makes no sense for this kind of device.
    """
    if devices[0].type == "cpu":
        if graphs is True:
            raise ValueError(
                "graphs=True asks for CUDA graphs, but the devices are CPUs; leave graphs out, or name "
                "CUDA devices"
            )
        return CpuMachine(schedule, mode, rule=rule, precision=precision, cpu_threads=cpu_threads)
    if cpu_threads is not None:
        raise ValueError(
            "cpu_threads is for stages on the CPU, but these devices are CUDA ones; leave it out"
        )
    if graphs is True and rule.needs_python:
        raise ValueError(
            f"graphs=True asks for CUDA graphs, but {rule.needs_python}, which no graph "
            f"can hold; leave graphs out"
        )
    if precision.scales_loss and rule.optimizer is not None:
        raise ValueError(
            "precision='float16' leaves out updates whose gradients are not finite, and on CUDA devices "
            "a torch optimizer would have to wait for the device to know; give precision='bfloat16', "
            "or leave optimizer out (the fused SGD decides on the device)"
        )
    from fdg_cuda.cuda_machine import CudaMachine

    ordinals = [device.index for device in devices]
    return CudaMachine(schedule, mode, ordinals, rule=rule, precision=precision, graphs=graphs)


def check_options(graphs: object, cpu_threads: object) -> None:
    """What can be said of options before any device is looked for.

    Raises:
        TypeError, ValueError: a value that can never be.
    """
    if graphs != "auto" and not isinstance(graphs, bool):
        raise ValueError(f"graphs must be 'auto', True or False; got {graphs!r}")
    if cpu_threads is None:
        return
    if isinstance(cpu_threads, bool) or not isinstance(cpu_threads, int):
        raise TypeError(
            f"cpu_threads must be a whole number, the cores all stages share; got {cpu_threads!r}"
        )
    if cpu_threads < 1:
        raise ValueError(f"cpu_threads must be at least 1; got {cpu_threads}")
