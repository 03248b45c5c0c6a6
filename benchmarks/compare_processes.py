"""The ways of training that take two processes, which meet over gloo: DDP, 1F1B and GPipe of torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.compare_trainers import Place, Stepwise, Trainer, sgd
from benchmarks.cuts import STAGES
from benchmarks.steps import plain_step

PROCESSES = 2
PATIENCE = timedelta(minutes=10)  # whoever asked for a turn gives up sooner


def meet(place: Place) -> None:
    """Join the way's process group, if this process has not yet."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        # Both are on this machine, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place.meeting}",
            rank=place.rank,
            world_size=PROCESSES,
            timeout=PATIENCE,
        )


def ddp(place: Place) -> Trainer:
    """Each process trains on its half of the batch."""
    meet(place)
    chain = place.case.chain(channels_last=True)
    x, y = place.case.batch(channels_last=True)
    half = place.case.batch_size // PROCESSES
    mine = slice(place.rank * half, (place.rank + 1) * half)
    model = DistributedDataParallel(chain)
    return Stepwise(partial(plain_step, model, sgd(model), (x[mine], y[mine])), chain)


def pipelining(place: Place, *, schedule: str, micro_batches: int) -> Trainer:
    """``torch.distributed.pipelining``, a stage per process."""
    from torch.distributed import pipelining as of_torch  # seconds, which no other way needs

    meet(place)
    case, rank = place.case, place.rank
    last = rank == STAGES - 1
    part = place.stages(case.chain(channels_last=place.channels_last))[rank]
    module: nn.Module = part
    if case.model.convolutional and place.channels_last:
        module = nn.Sequential(
            *([] if rank == 0 else [FromWire()]), part, *([] if last else [ToWire()])
        )
    x, y = case.batch(channels_last=place.channels_last)
    stage = of_torch.PipelineStage(module, rank, STAGES, torch.device("cpu"))
    schedules = {"1F1B": of_torch.Schedule1F1B, "GPipe": of_torch.ScheduleGPipe}
    runs = schedules[schedule](stage, micro_batches, loss_fn=F.cross_entropy)
    optimizer = sgd(part)

    def step() -> None:
        optimizer.zero_grad()
        runs.step(*([x] if rank == 0 else []), target=y if last else None, return_outputs=False)
        optimizer.step()

    return Stepwise(step, part)


def layout_trial(place: Place) -> Callable[[], float]:
    """Seconds of a step of 1F1B in the layout of ``place``: which is faster depends on the net, for
    channels_last has to be left on the way from process to process."""
    trainer = pipelining(place, schedule="1F1B", micro_batches=4)
    return lambda: trainer.seconds_per_step(1, 2)


class _Reformat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: torch.memory_format, back: torch.memory_format
    ) -> Tensor:
        ctx.back = back
        return x.contiguous(memory_format=there)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].contiguous(memory_format=ctx.back), None, None


class ToWire(nn.Module):
    """From channels_last to what gloo sends, which is contiguous tensors only; back likewise."""

    def forward(self, x: Tensor) -> Tensor:
        sent: Tensor = _Reformat.apply(x, torch.contiguous_format, torch.channels_last)
        return sent


class FromWire(nn.Module):
    """The other end of :class:`ToWire`."""

    def forward(self, x: Tensor) -> Tensor:
        received: Tensor = _Reformat.apply(x, torch.channels_last, torch.contiguous_format)
        return received
