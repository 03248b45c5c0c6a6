"""How long the fused update takes, by the size of what it updates."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch
from torch import nn

from fdg_cuda.flat import FlatMemory
from fdg_cuda.layer_times import remembered_number

ELEMENTS = 1 << 22  # float32: beyond any cache, so that the memory's bandwidth decides
REPEATS = 7


def update_seconds_per_byte(device: torch.device, threads: int) -> float:
    """Seconds per byte of parameters, for an update with momentum and weight decay; measured once, and
    remembered as layers' costs are.

    Args:
        device: where it would run.
        threads: that share it, on the CPU.
    """
    on_cpu = device.type == "cpu"

    def measure() -> float:
        seconds = _on_cpu(threads) if on_cpu else _on_cuda(device)
        return seconds / (4 * ELEMENTS)

    return remembered_number(
        "update_seconds_per_byte",
        threads if on_cpu else 1,
        measure,
        device="cpu" if on_cpu else torch.cuda.get_device_name(device),
    )


def _on_cpu(threads: int) -> float:
    memory = FlatMemory([nn.Parameter(torch.zeros(ELEMENTS))], 2, 0)
    hyper = np.array([[0.1, 0.9, 5e-4, 0.0, 1.0]])
    update = memory.cpu_sgd(hyper, threads)
    gradient = torch.zeros(ELEMENTS)
    seconds = []
    for number in range(REPEATS + 1):
        memory.place_gradients([gradient], 0)
        begin = time.perf_counter()
        update.run_update(number % 2, 1 - number % 2, 0)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def _on_cuda(device: torch.device) -> float:
    # torch's fused kernel moves the same bytes, and needs no scheduler to run.
    parameter = nn.Parameter(torch.zeros(ELEMENTS, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    seconds = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])
