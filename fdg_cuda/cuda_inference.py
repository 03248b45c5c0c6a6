"""Forward passes over stages on CUDA devices: enqueued batch after batch, stage after stage.

Everything goes to the devices' current streams, and copies between devices wait for each other there,
so stages on different devices work on different batches at the same time. The host waits for nothing
but the results of a batch several batches ago.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from fdg_cuda.accelerator import accelerator
from fdg_cuda.batches import Batch
from fdg_cuda.chain import check_output
from fdg_cuda.cuda_stage import CudaStage
from fdg_cuda.errors import said_out_of_memory, said_where
from fdg_cuda.forms import AnyForm, fill, form_of, without_gaps
from fdg_cuda.inference import Finish
from fdg_cuda.nested import Nested, cloned, device_of, map_tensors, moved, tensors

# As many again as there are stages: what the host does between two batches shows on no device.
BATCHES_PER_STAGE = 2


@dataclass
class _OnItsWay:
    """A result that is being copied to the host, or that stays on a device."""

    form: AnyForm | None
    result: Nested  # with a form: pinned memory
    arrived: Callable[[], None]

    def wait(self) -> Nested:
        self.arrived()
        # The pinned memory goes back to torch, which keeps it for the next copy.
        return self.result if self.form is None else cloned(self.form.view(self.result))


def run_stages(
    stages: Sequence[CudaStage], batches: Iterator[Batch], finish: Finish, *, to_host: bool
) -> Generator[Nested, None, None]:
    """What ``finish`` makes of each batch's output and target, in order; see
    :meth:`fdg_cuda.machine.Machine.inference`."""
    on_their_way: deque[_OnItsWay] = deque()
    for number, (x, y) in enumerate(batches):
        with torch.no_grad():
            output = _forward(stages, x, number)
            with said_where(f"the loss of batch {number}"):
                result = finish(output, _brought(y, device_of(output)))
            home = torch.device("cpu") if to_host else device_of(x)
            result = moved(result, stages[-1].device)
            on_their_way.append(_sent(result, stages[-1].ordinal, home))
        if len(on_their_way) > BATCHES_PER_STAGE * len(stages):
            yield on_their_way.popleft().wait()
    while on_their_way:
        yield on_their_way.popleft().wait()


def _forward(stages: Sequence[CudaStage], x: Nested, number: int) -> Nested:
    value = _brought(x, stages[0].device)
    for stage in stages:
        where = f"the forward of batch {number} at stage {stage.index}"
        with said_where(where), said_out_of_memory(stage.index, stage.ordinal):
            if stage.index > 0:
                value = moved(value, stage.device)
            with stage.precision.autocast(stage.device.type):
                for layer in stage.layers:
                    value = layer(value)
        value = check_output(value, f"stage {stage.index}")
    return value


def _brought(value: Nested, device: torch.device) -> Nested:
    """A copy of ``value`` on ``device``. The caller may change ``value`` at once."""
    found = tensors(value)
    if not found:
        return value
    if any(tensor.device.type != "cpu" for tensor in found):
        return map_tensors(
            lambda tensor: torch.empty_like(tensor, device=device).copy_(tensor), value
        )
    source = map_tensors(without_gaps, value)
    form = form_of(source)
    memory = accelerator().pinned(form.nbytes)
    fill(form, memory, source)
    # torch does not use pinned memory again before copies from it are done.
    return form.view(memory.to(device, non_blocking=True))


def _sent(result: Nested, ordinal: int, home: torch.device) -> _OnItsWay:
    """``result``, of device ``ordinal``, on its way to ``home``."""
    if home.type != "cpu":
        return _OnItsWay(None, moved(result, home), lambda: None)
    source = map_tensors(without_gaps, result)
    form = form_of(source)
    memory = accelerator().pinned(form.nbytes)
    fill(form, memory, source, non_blocking=True)
    return _OnItsWay(form, memory, accelerator().mark(ordinal))
