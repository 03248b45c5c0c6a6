"""What training on K stages would be like, for K = 1, 2, ...: before one buys the hardware.

The model's pieces are measured on a device that is here. For every K and every mode the best cut is
found (:mod:`fdg_cuda.cutting`), and the very schedule is replayed with what was measured and with the
time that copies take (:mod:`fdg_cuda.simulation`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.devices import Device
from fdg_cuda.errors import said_where
from fdg_cuda.hardware_file import Hardware
from fdg_cuda.layer_times import anew
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.model_chain import ModelChain
from fdg_cuda.names import counted
from fdg_cuda.nested import Nested, check_nested, sample_count, tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.plan_places import find_places
from fdg_cuda.planner import Planner, numbers_of_stages
from fdg_cuda.plans import Choice, Plan, Row
from fdg_cuda.precision import parse_precision
from fdg_cuda.staged_model import chain_of, lay_out

WORTH_A_STAGE = 1.05  # fewer stages are recommended unless more are faster by more, for each


def plan(
    model: nn.Module | Sequence[nn.Module],
    sample: Nested,
    devices: Sequence[Device] | None = None,
    *,
    target: Nested = None,
    loss_fn: LossFunction | None = None,
    hardware: Hardware | str | os.PathLike[str] | None = None,
    backward_weights: str | None = None,
    precision: str | torch.dtype = "float32",
    capture: bool = False,
    on_progress: Callable[[str], object] = lambda what: None,
) -> Plan:
    """Predict what training ``model`` on one, two, ... stages would be like.

    Predicted are steady ticks, in which every stage works on a batch, not the fill and drain of an
    epoch. The model's numbers are left as they are. Layers are measured anew, and what is found takes
    the place of what ``FDGRunner`` remembers of them.

    Args:
        model: any that :class:`~fdg_cuda.FDGRunner` takes.
        sample: the input of a batch of the size that training will have.
        devices: as for ``FDGRunner``; planned are the first of them, the first two, and so on. None: the
            CUDA devices of this machine, or one CPU stage per core.
        target: what ``loss_fn`` takes beside the output. Without target and ``loss_fn`` the mean square
            of the output stands in for the loss.
        loss_fn: default cross-entropy, if there is a target.
        hardware: devices that need not be here, in place of ``devices``; or a file that describes them
            (see :mod:`fdg_cuda.hardware_file`). Layers are measured on CUDA device 0, else the CPU.
        backward_weights: the only mode to plan with; None: the best of all.
        precision, capture: as for ``FDGRunner``.
        on_progress: told what is done next.

    Raises:
        TypeError, ValueError: arguments that cannot work, and what would.
        ModelCaptureError: the model's forward cannot be followed.
        OSError: the file cannot be read.
    """
    check_nested(sample, "the sample")
    places = find_places(devices, hardware)
    modes = _modes(backward_weights)
    chain = chain_of(model, capture=capture)
    parsed = parse_precision(precision, chain.model)
    batch, loss = _batch(sample, target, loss_fn)
    with anew(), _as_trained(chain), _perhaps_a_batch(sample, target):
        on_progress("running the model on the sample")
        lay_out(chain, sample, parsed)
        planner = Planner(chain, batch, loss, places, parsed)
        most = min(len(places.devices), 1 + len(chain.allowed_cuts()))
        rows = []
        for stages in numbers_of_stages(most):
            on_progress(f"planning {counted(stages, 'stage')}")
            rows.append(planner.row(stages, modes))
        bp_seconds = planner.bp_seconds(most)
    return Plan(
        rows=tuple(rows),
        recommended=_recommended(rows, bp_seconds),
        bp_seconds=bp_seconds,
        batch_size=sample_count(sample),
        layers=len(chain.layers),
        fastest_speed=places.fastest_speed,
        note=planner.note,
        capture=capture,
        between_children=chain.has_cuts_inside,
    )


def _recommended(rows: Sequence[Row], bp_seconds: float) -> Choice | None:
    """The fastest that is worth its stages; more than one have to be faster than BP, too."""
    best: Choice | None = None
    for row in rows:
        choice = row.choice
        if choice is None:
            continue
        if best is None:
            best = choice
            continue
        more = len(choice.stages) - len(best.stages)
        seconds = best.tick_seconds
        if len(best.stages) == 1:
            seconds = min(seconds, bp_seconds)
        if seconds > choice.tick_seconds * WORTH_A_STAGE**more:
            best = choice
    return best


@contextmanager
def _as_trained(chain: ModelChain) -> Iterator[None]:
    """In training mode, as ``fit`` would put it, if the model is in evaluation mode as a whole."""
    modes = [(module, module.training) for module in chain.model.modules()]
    try:
        if not chain.is_training:
            chain.model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _perhaps_a_batch(sample: Nested, target: Nested) -> AbstractContextManager[None]:
    """Where the model refuses a sample in it that may have been meant as a batch, that is said."""
    if target is None and isinstance(sample, (tuple, list)) and len(sample) == 2:
        return said_where(
            "a plan whose sample is a pair; for a batch (x, y): plan(model, x, target=y)"
        )
    return nullcontext()


def _modes(only: str | None) -> list[BackwardWeights]:
    known = [mode.value for mode in BackwardWeights]
    if only is not None and only not in known:
        raise ValueError(f"backward_weights must be one of {', '.join(known)}; got {only!r}")
    return [BackwardWeights(mode) for mode in (known if only is None else [only])]


def _batch(
    sample: Nested, target: Nested, loss_fn: LossFunction | None
) -> tuple[Batch, LossFunction]:
    if loss_fn is not None:
        return (sample, target), loss_fn
    return (sample, target), _mean_square if target is None else cross_entropy


def _mean_square(output: Nested, target: Nested) -> Tensor:
    floating = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in floating]).sum()
