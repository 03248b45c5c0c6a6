"""The fused update on one card beside ``torch.optim.SGD`` and a plain copy of as many bytes.

Gradients are there from the beginning and stay: the update alone is timed. It reads weights,
gradients and momentum and writes weights and momentum: five float32 numbers per parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.device_clock import Deadline, DeviceClock
from benchmarks.harness import quartiles
from fdg_cuda import _core
from fdg_cuda.flat import FlatMemory

BYTES = 20  # per parameter
GOAL = 0.9  # of the copy's bandwidth
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4
LARGEST = 640 * 640 * 9  # numbers in a tensor: the largest convolution of WRN-28-10
SLEEP_CYCLES = 20_000_000  # of the device, while the host enqueues what is timed
FDG = "fdg fused"
COPY = "copy"


class Update(ABC):
    """One way to update, ``launches`` times."""

    stream: Any = None  # where it runs; None: torch's

    @abstractmethod
    def enqueue(self, launches: int) -> None:
        """Put them on the stream."""

    def close(self) -> None:
        """End what it started."""


class TorchUpdate(Update):
    def __init__(self, parameters: list[nn.Parameter], **kind: bool) -> None:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        self._optimizer = torch.optim.SGD(
            parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **kind
        )

    def enqueue(self, launches: int) -> None:
        for _ in range(launches):
            self._optimizer.step()


class Copy(Update):
    """Reads half of the update's bytes and writes the other half."""

    def __init__(self, parameters: int, device: torch.device) -> None:
        size = parameters * BYTES // 2
        self._source = torch.zeros(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)

    def enqueue(self, launches: int) -> None:
        for _ in range(launches):
            self._target.copy_(self._source)


class FdgUpdate(Update):
    """Out of place, from one weight copy into the other, as the pipeline does it."""

    def __init__(self, parameters: list[nn.Parameter], clock: DeviceClock) -> None:
        self._memory = FlatMemory(parameters, 2, 0, clock.device)
        self._gradients = [torch.randn_like(parameter) for parameter in parameters]
        self._memory.gradient_table[0] = [g.data_ptr() for g in self._gradients]
        self._hyper = np.array([[LR, MOMENTUM, WEIGHT_DECAY, 0.0, 1.0]])
        clock.synchronize()
        self._scheduler = _core.Scheduler(
            "cuda" if clock.is_cuda else "cpu", ["update"], devices=[0] if clock.is_cuda else []
        )
        self._tick: dict[int, int] = {}
        if clock.is_cuda:
            self.stream = clock.stream(self._scheduler.stream_handle(0))
        self._actions = [self._action(*copies, clock) for copies in ((0, 1), (1, 0))]

    def enqueue(self, launches: int) -> None:
        if launches not in self._tick:
            both = [(action, 0) for action in self._actions]
            self._tick[launches] = self._scheduler.add_tick(both * (launches // 2))
        self._scheduler.submit(self._tick[launches], 0)

    def wait(self) -> None:
        self._scheduler.synchronize()

    def close(self) -> None:
        self._scheduler.close()

    def _action(self, source: int, target: int, clock: DeviceClock) -> int:
        if clock.is_cuda:
            options = self._memory.addresses(self._hyper)
            options |= {"gradient_dtype": options["dtype"], "device": 0}
            sgd = _core.CudaSgd(**options, slots=1, ticks_in_flight=1)
            work = sgd.update(source, target, 0)
        else:
            work = self._memory.cpu_sgd(self._hyper, 1).update(source, target)
        return self._scheduler.add_action(
            code="U", stage=0, slot=0, stream=0, reads=[], writes=[], work=work
        )


def make_parameters(count: int, device: torch.device) -> list[nn.Parameter]:
    sizes = [LARGEST] * (count // LARGEST)
    sizes += [count - sum(sizes)] if count > sum(sizes) else []
    return [nn.Parameter(torch.randn(size, device=device)) for size in sizes]


def measure_update(
    counts: list[int], clock: DeviceClock, launches: int, rounds: int, deadline: Deadline
) -> dict[str, Any]:
    """Per number of parameters the seconds of every way, GB/s and shares of the copy's bandwidth."""
    return {
        "launches": launches,
        "bytes_per_parameter": BYTES,
        "sizes": {
            f"{count / 1e6:g}M": of_size(count, clock, launches, rounds, deadline)
            for count in counts
        },
    }


def of_size(
    count: int, clock: DeviceClock, launches: int, rounds: int, deadline: Deadline
) -> dict[str, Any]:
    device = clock.device
    updates: dict[str, Update] = {
        FDG: FdgUpdate(make_parameters(count, device), clock),
        COPY: Copy(count, device),
        "torch fused": TorchUpdate(make_parameters(count, device), fused=True),
        "torch foreach": TorchUpdate(make_parameters(count, device), foreach=True),
    }
    try:
        for update in updates.values():
            timed(update, clock, launches)
        measured = [{name: timed(update, clock, launches) for name, update in updates.items()}]
        while len(measured) < rounds and deadline.left > 0:
            measured.append({n: timed(update, clock, launches) for n, update in updates.items()})
    finally:
        for update in updates.values():
            update.close()
        updates.clear()
        clock.forget()
    gigabytes = count * BYTES / 1e9
    return {
        "parameters": count,
        "rounds": len(measured),
        "cases": {
            name: {
                "ms": quartiles([1e3 * r[name] for r in measured]),
                "gb_per_s": quartiles([gigabytes / r[name] for r in measured]),
                "share_of_copy": quartiles([r[COPY] / r[name] for r in measured]),
            }
            for name in measured[0]
        },
    }


def timed(update: Update, clock: DeviceClock, launches: int) -> float:
    """Seconds of one of ``launches``, which are all enqueued before the first begins."""
    clock.synchronize()
    if clock.is_cuda:
        with torch.cuda.stream(update.stream):
            torch.cuda._sleep(SLEEP_CYCLES)
    begin = clock.mark(update.stream)
    update.enqueue(launches)
    if isinstance(update, FdgUpdate) and not clock.is_cuda:
        update.wait()
    end = clock.mark(update.stream)
    seconds = clock.between(begin, end)
    if isinstance(update, FdgUpdate):
        update.wait()
    return seconds / launches


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for size, measured in result["sizes"].items():
        share = measured["cases"][FDG]["share_of_copy"]["median"]
        found.append(
            {
                "name": f"fused update of {size} parameters, share of a copy's bandwidth",
                "measured": share,
                "goal": GOAL,
                "sense": "at least",
                "met": share >= GOAL,
            }
        )
    return found
