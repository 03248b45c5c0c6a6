"""Forward passes over stages on the CPU: a thread per stage, with its share of the cores.

Each stage draws random numbers from a generator of its own, as in training: threads that share torch's
would take them in the order in which they happen to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import torch
from torch import nn

from fdg_cuda._core import Scheduler
from fdg_cuda.batches import Batch
from fdg_cuda.chain import check_output
from fdg_cuda.cpu_threads import Feeding, set_threads_of_streams
from fdg_cuda.errors import said_where
from fdg_cuda.forward_only import ForwardLayout, ForwardSchedule
from fdg_cuda.hops import storages, without_own
from fdg_cuda.inference import Finish
from fdg_cuda.layout import INBOX_HALVES, Step
from fdg_cuda.nested import Nested, cloned
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT
from fdg_cuda.precision import Precision
from fdg_cuda.program import Program
from fdg_cuda.randomness import drawing_from, reroute_generator, restore_generator, seed_stage
from fdg_cuda.schedule import Kind


class CpuInference:
    """Streams of one evaluation; ``close`` ends them whatever happened.

    The stages' generators are seeded from where torch's stands, which is left there.

    Args:
        parts: the layers of each stage.
        finish: what is made of the last stage's output; runs on its thread.
        precision: in which the layers compute.
        threads: intra-op threads per stage.
        first: the number of the first batch, for what is said of exceptions.
        delays: (seed, longest in microseconds) of the sleeps put before every action, for tests.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[nn.Module]],
        finish: Finish,
        *,
        precision: Precision,
        threads: int,
        first: int = 0,
        delays: tuple[int, int] = (0, 0),
    ) -> None:
        self._ends = ends = _Ends(finish, first)
        self._rerouted = False
        self._schedule = ForwardSchedule(len(parts))
        self._feeding = Feeding(len(parts) * threads)
        layout = ForwardLayout(len(parts))
        self._scheduler = Scheduler(
            "cpu",
            layout.streams,
            max_ticks_in_flight=MAX_TICKS_IN_FLIGHT,
            delay_seed=delays[0],
            max_delay_us=delays[1],
        )
        try:
            set_threads_of_streams(self._scheduler, len(parts), threads)
            reroute_generator()
            self._rerouted = True
            seed = _next_number()
            stages = [
                _ForwardStage(k, layers, precision, ends, seed) for k, layers in enumerate(parts)
            ]
            for lower, upper in pairwise(stages):
                lower.above = upper
            self._program = Program(self._schedule, layout, self._scheduler, stages)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all streams. What has not begun is dropped."""
        self._feeding.end()
        self._scheduler.close()
        if self._rerouted:
            restore_generator()
            self._rerouted = False

    def run(self, batches: Iterator[Batch]) -> Iterator[Nested]:
        """What ``finish`` made of each batch, in order, a bounded number of batches behind."""
        # Behind the enqueuing of a tick this many ticks, and so many batches, are surely done.
        behind = MAX_TICKS_IN_FLIGHT + self._schedule.latency
        ends = self._ends
        total: int | None = None
        for tick in count():
            if total is None:
                with self._feeding:
                    batch = next(batches, None)
                    if batch is None:
                        total = tick
                    else:
                        # Copies: the loader may refill its tensors.
                        ends.inputs[tick], ends.targets[tick] = cloned(batch[0]), cloned(batch[1])
            if total is not None and tick >= total + self._schedule.latency:
                break
            self._program.submit(tick, total)
            if tick >= behind:
                yield ends.results.pop(tick - behind)
        self._scheduler.synchronize()
        for batch_number in sorted(ends.results):
            yield ends.results.pop(batch_number)


@dataclass
class _Ends:
    """What enters, and what comes out; by batch."""

    finish: Finish
    first: int
    inputs: dict[int, Nested] = field(default_factory=dict)
    targets: dict[int, Nested] = field(default_factory=dict)
    results: dict[int, Nested] = field(default_factory=dict)


class _ForwardStage:
    """Its forward runs on its own thread; gradients and settings are a thread's own too."""

    def __init__(
        self,
        index: int,
        layers: Sequence[nn.Module],
        precision: Precision,
        ends: _Ends,
        seed: int,
    ) -> None:
        self.above: _ForwardStage | None = None
        self._index = index
        self._layers = list(layers)
        self._buffers = storages(buffer for layer in layers for buffer in layer.buffers())
        self._precision = precision
        self._ends = ends
        self._generator = torch.Generator()
        seed_stage(self._generator, seed, index)
        self._inference_mode = torch.is_inference_mode_enabled()  # of the caller
        self._inbox: list[Nested] = [None] * INBOX_HALVES
        self._output: Nested = None

    def work(self, step: Step) -> Callable[[int], None]:
        return self._draw_own if step.kind is Kind.FORWARD else self._send

    def _draw_own(self, batch: int) -> None:
        with drawing_from(self._generator):
            self._forward(batch)

    def _forward(self, batch: int) -> None:
        half = batch % INBOX_HALVES
        value = self._ends.inputs.pop(batch) if self._index == 0 else self._inbox[half]
        self._inbox[half] = None
        number = self._ends.first + batch
        with torch.inference_mode() if self._inference_mode else torch.no_grad():
            autocast = self._precision.autocast("cpu")
            with said_where(f"the forward of batch {number} at stage {self._index}"), autocast:
                for layer in self._layers:
                    value = layer(value)
            output = check_output(value, f"stage {self._index}")
            if self.above is not None:
                # The next batch may change buffers before the stage above has read them.
                self._output = without_own(output, self._buffers)
                return
            with said_where(f"the loss of batch {number}"):
                target = self._ends.targets.pop(batch)
                self._ends.results[batch] = self._ends.finish(output, target)

    def _send(self, batch: int) -> None:
        assert self.above is not None
        self.above._inbox[batch % INBOX_HALVES] = self._output
        self._output = None


def _next_number() -> int:
    """What torch's generator would draw next."""
    ahead = torch.Generator()
    ahead.set_state(torch.default_generator.get_state())
    return int(torch.randint(2**63 - 1, (), generator=ahead))
