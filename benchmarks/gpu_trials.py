"""What one card is measured with: BP in plain torch, three ways, and ``fdg`` in K stages.

A trial stays ready between its spans, so that trials can take turns.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.device_clock import DeviceClock
from benchmarks.harness import quartiles
from fdg_cuda import FDGRunner, models
from fdg_cuda.layout import CudaLayout
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT, Pipeline

# A rate at which random labels are not learnt: weights must stay finite, nothing else.
HYPER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
BATCHES = 4  # that take turns
WARM_UP = 3  # steps at the beginning of a span, not timed
PRECISIONS = ("float32", "tf32", "bfloat16")
ROUNDS_WITHOUT_END = 1_000_000


class Autocast(nn.Module):
    """A layer in bfloat16, its weights in float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            output: Tensor = self.layer(x)
            return output


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target)


@dataclass(frozen=True)
class Task:
    """A net, its batches and the device.

    Attributes:
        precision: ``float32`` (no tf32), ``tf32`` or ``bfloat16``.
    """

    net: str
    precision: str
    device: torch.device
    batch_size: int = 128
    image_size: int = 32

    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        model = models.build(self.net, image_size=self.image_size)
        if self.precision == "bfloat16":
            model = nn.Sequential(*map(Autocast, model))
        return model

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        size = (self.batch_size, 3, self.image_size, self.image_size)
        pairs = [
            (
                torch.randn(size, generator=generator),
                torch.randint(0, 10, size[:1], generator=generator),
            )
            for _ in range(BATCHES)
        ]
        if self.device.type != "cuda":
            return pairs
        return [(x.pin_memory(), y.pin_memory()) for x, y in pairs]

    def set_precision(self) -> None:
        """For all of torch."""
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"


@dataclass(frozen=True)
class Span:
    """Seconds per step: on the device in the steady state, and of the clock on the wall over all
    steps (for ``fdg`` with the fill and the drain)."""

    step_s: float
    wall_s: float


class Trial(ABC):
    """One case, ready to run.

    Args:
        stream: the ``cudaStream_t`` to compute on; 0: torch's or the runner's own.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.clock = DeviceClock(task.device)

    @abstractmethod
    def span(self, steps: int) -> Span:
        """Train ``steps`` timed steps."""

    def notes(self) -> dict[str, Any]:
        """What else there is to report."""
        return {}

    def close(self) -> None:
        """Let go of everything."""


class BpTrial(Trial):
    """Forward, backward and ``torch.optim.SGD(fused=True)``.

    Args:
        kind: ``eager``, ``compiled`` or ``one graph`` (a captured graph of the whole step).
    """

    def __init__(self, task: Task, kind: str, stream: int = 0) -> None:
        super().__init__(task)
        self._stream = self.clock.stream(stream) if stream else None
        self._model = task.model().to(task.device)
        self._forward: Callable[[Tensor], Tensor] = self._model
        if kind == "compiled":
            self._forward = torch.compile(self._model)
        self._optimizer = torch.optim.SGD(self._model.parameters(), fused=True, **HYPER)
        self._batches = cycle(task.batches())
        x, y = next(self._batches)
        self._x, self._y = x.to(task.device), y.to(task.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if kind == "one graph":
            with self._on_stream():
                self._capture()

    def span(self, steps: int) -> Span:
        with self._on_stream():
            for _ in range(WARM_UP):
                self._step()
            self.clock.synchronize()
            wall = time.perf_counter()
            begin = self.clock.mark()
            for _ in range(steps):
                self._step()
            end = self.clock.mark()
            self.clock.synchronize()
            seconds = self.clock.between(begin, end)
        return Span(seconds / steps, (time.perf_counter() - wall) / steps)

    def close(self) -> None:
        self._graph = None
        self._forward = self._model = nn.Sequential()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _step(self) -> None:
        x, y = next(self._batches)
        if self._graph is None:
            device = self.task.device
            self._train(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
            return
        self._x.copy_(x, non_blocking=True)
        self._y.copy_(y, non_blocking=True)
        self._graph.replay()

    def _train(self, x: Tensor, y: Tensor) -> None:
        self._optimizer.zero_grad()
        torch.autograd.backward(loss_fn(self._forward(x), y))
        self._optimizer.step()

    def _capture(self) -> None:
        stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._train(self._x, self._y)
            self._optimizer.zero_grad()  # the graph's gradients lie in its own memory
        self.clock.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._train(self._x, self._y)
        self._graph = graph


class _TrialClosed(Exception):  # noqa: N818
    """Ends the fit of a trial."""


class FdgTrial(Trial):
    """The runner in K stages. One ``fit`` on a thread of its own, an epoch per span, so that graphs
    are captured once.

    Args:
        streams: per stage the ``cudaStream_t`` it computes on; empty: the runner's own.
    """

    def __init__(
        self, task: Task, stages: int, *, graphs: bool, streams: Sequence[int] = ()
    ) -> None:
        super().__init__(task)
        is_cuda = self.clock.is_cuda
        self.runner = FDGRunner(
            task.model(),
            [0 if is_cuda else "cpu"] * stages,
            loss_fn=loss_fn,
            graphs=graphs,
            cpu_threads=None if is_cuda else stages,
            **HYPER,
        )
        self._streams = list(streams)
        if streams:
            self.runner._machine.compute_streams = self._streams  # type: ignore[attr-defined]
        self.ticks = TickWatch(self.clock, stages)
        self.ticks.watch(self.runner)
        self._batches = task.batches()
        schedule = self.runner.schedule
        # From here on all stages are at work, and no step is enqueued for the first time.
        self.filled = schedule.latency + max(map(schedule.slots, range(stages))) + 1 + WARM_UP
        self._steps = 0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = False
        self._error: BaseException | None = None
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def span(self, steps: int) -> Span:
        self._steps = steps
        self.ticks.first, self.ticks.last = self.filled, self.filled + steps
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return Span(self.ticks.seconds() / steps, self._seconds / self._length)

    def notes(self) -> dict[str, Any]:
        return {"split": self.runner.split, "host_us_per_tick": self.ticks.host_us()}

    def close(self) -> None:
        self._closing = True
        self._go.release()
        self._thread.join()

    @property
    def _length(self) -> int:
        return self.filled + self._steps + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a span: the runner's loader."""
        return islice(cycle(self._batches), self._length)

    def _fit(self) -> None:
        try:
            self._wait()
            group = self.clock.stream(self._streams[0]) if self._streams else None
            # The cut is measured on the current stream: on what a stage will have.
            with nullcontext() if group is None else torch.cuda.stream(group):
                self.runner.fit(self, ROUNDS_WITHOUT_END, on_epoch=self._end_span)
        except _TrialClosed:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()

    def _end_span(self, result: Any) -> None:
        self._seconds = result.seconds
        self._done.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._closing:
            raise _TrialClosed


class TickWatch:
    """Marks two ticks on the last stage's compute stream, and times the host as it enqueues.

    Only those ticks count for the host before which there was room: ``submit`` waits for nothing
    then.
    """

    def __init__(self, clock: DeviceClock, stages: int) -> None:
        self.first = self.last = 0
        self._clock = clock
        self._stages = stages
        self._begin: Any = None
        self._end: Any = None
        self._submits: list[float] = []
        self._loops: list[float] = []

    def watch(self, runner: FDGRunner) -> None:
        """From the next ``fit`` on."""
        machine: Any = runner._machine
        plain = machine.pipeline

        def watched(*arguments: Any) -> Pipeline:
            pipeline: Pipeline = plain(*arguments)
            self._attach(pipeline)
            return pipeline

        machine.pipeline = watched

    def seconds(self) -> float:
        """Device time from the first to the last tick."""
        return self._clock.between(self._begin, self._end)

    def host_us(self) -> dict[str, Any] | None:
        """Microseconds of a tick: enqueuing it, the same per stage, and with all that Python does
        between two ticks. None if there never was room."""
        if not self._submits:
            return None
        return {
            "submit": quartiles([1e6 * s for s in self._submits]),
            "submit_per_stage": quartiles([1e6 * s / self._stages for s in self._submits]),
            "loop": quartiles([1e6 * s for s in self._loops]),
        }

    def _attach(self, pipeline: Pipeline) -> None:
        submit, scheduler = pipeline._program.submit, pipeline._scheduler
        stream = None
        if self._clock.is_cuda:
            handle = scheduler.stream_handle(CudaLayout.compute(self._stages - 1))
            stream = self._clock.stream(handle)
        left = 0.0

        def timed(tick: int, batches: int | None = None) -> None:
            nonlocal left
            if tick == self.first:
                self._begin = self._clock.mark(stream)
            if tick == self.last:
                self._end = self._clock.mark(stream)
            room = scheduler.ticks_in_flight < MAX_TICKS_IN_FLIGHT
            entered = time.perf_counter()
            submit(tick, batches)
            now = time.perf_counter()
            if room and self.first < tick < self.last:
                self._submits.append(now - entered)
                self._loops.append(now - left)
            left = now

        pipeline._program.submit = timed  # type: ignore[method-assign]
