"""What the CUDA stages of one ``fit`` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fdg_cuda.accelerator import Lane
from fdg_cuda.hyper import HyperTable
from fdg_cuda.mail import Outbox

if TYPE_CHECKING:
    from fdg_cuda.pipeline import LossFunction


@dataclass
class CudaFit:
    """See above.

    Attributes:
        lanes: torch's view of the scheduler's streams, in their order.
        handles: those streams themselves, each a ``cudaStream_t``.
        staged: per hop, whether it goes through pinned host memory.
        regular: uint8 (stages, rows): whether the batch in a row has the regular form there.
        inputs, targets: the batches that entered, in pinned memory.
        results: float64 (rows, METRICS) in pinned memory, with the address of each row.
        graphs: ``"auto"``, ``"always"`` or ``"never"``.
    """

    lanes: list[Lane]
    handles: list[int]
    staged: list[bool]
    hyper: HyperTable
    regular: np.ndarray
    rows: int
    ticks_in_flight: int
    inputs: Outbox
    targets: Outbox
    results: Tensor
    result_addresses: np.ndarray
    loss_fn: LossFunction
    graphs: str
