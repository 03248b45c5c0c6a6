"""One forward and backward of all layers, as a single stage does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fdg_cuda.batches import Batch
from fdg_cuda.errors import said_where
from fdg_cuda.nested import cloned, tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision


@dataclass(frozen=True)
class WholePass:
    """Seconds of the forward and of the backward."""

    forward: float
    backward: float


def run_whole(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: LossFunction,
    precision: Precision,
    synchronize: Callable[[], object] = lambda: None,
) -> WholePass:
    """Leaves no gradients.

    Args:
        synchronize: waits until the device has done what it was given.
    """
    x, target = cloned(batch[0]), cloned(batch[1])

    def now() -> float:
        synchronize()
        return time.perf_counter()

    begin = now()
    with (
        said_where("the layers one behind the other, at the first batch"),
        precision.autocast(tensors(batch[0])[0].device.type),
    ):
        for layer in layers:
            x = layer(x)
        value = loss(x, target)
    between = now()
    torch.autograd.backward([value])
    end = now()
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = None
    return WholePass(between - begin, end - between)
