"""How long a schedule would take: its own steps, replayed from durations, without any device.

Nothing here says which stage does what when. The steps are those of one tick of
:class:`~fdg_cuda.schedule.Schedule`, on the streams and with the buffers of a layout, and what each of
them waits for follows from its buffers, as in the scheduler that trains.

What is left out: what the host needs to enqueue a tick, the loading of inputs and labels, the
reading of metrics, and plain copies of weights. They take no time here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray

from fdg_cuda import _core
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.checks import whole
from fdg_cuda.layout import CpuLayout, CudaLayout, Layout, Step, Transfer, copies, replaying
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT
from fdg_cuda.schedule import Kind, Schedule
from fdg_cuda.timeline import Epoch, Lane, Span, Timeline

LAYOUTS: dict[str, type[CpuLayout] | type[CudaLayout]] = {"cpu": CpuLayout, "cuda": CudaLayout}


@dataclass(frozen=True)
class StageTimes:
    """Seconds that one stage's work on one batch takes.

    Attributes:
        forward: of the whole stage.
        backward: without the second forward of ``"replay"``, which :func:`simulate` adds.
        update: one, however many batches it is made from.
        send_activation: until what the stage made has arrived at the stage above.
        send_error: until its error signal has arrived at the stage below.

    Raises:
        ValueError: a time is negative or not finite.
    """

    forward: float
    backward: float
    update: float
    send_activation: float = 0.0
    send_error: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if not (isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{field.name} must be 0 or more seconds; got {seconds}")


@dataclass(frozen=True, eq=False)
class Simulation:
    """One epoch, begun with everything idle.

    Attributes:
        seconds: from the first action's begin to the last one's end.
        tick_ends: (ticks,) float64, seconds: when the last action of each tick ended.
        tick_seconds: a tick's length in the steady state: the mean over the latter half of the ticks
            in which every stage has a batch to forward and one to backward; NaN where there are less
            than two such ticks. A mean, for ticks may take turns in being short and long.
        busy: per stage, seconds its compute stream is at work.
        timeline: of the window that was asked for, without what takes no time (see the head of this
            file).
    """

    seconds: float
    tick_ends: NDArray[np.float64]
    tick_seconds: float
    busy: tuple[float, ...]
    timeline: Timeline


def simulate(
    schedule: Schedule,
    times: Sequence[StageTimes],
    batches: int,
    *,
    layout: str = "cuda",
    mode: str = "stash",
    window: range | None = None,
    ticks_in_flight: int | None = MAX_TICKS_IN_FLIGHT,
) -> Simulation:
    """Predict an epoch of ``batches`` batches.

    With several batches per update, the update takes its time in the ticks in which there is one.

    Args:
        schedule: the rule.
        times: one per stage. What the first stage sends down and the last one up is not used.
        batches: of the epoch, at least one.
        layout: ``"cuda"``: a stage sends while it works on (no hop through the host's memory);
            ``"cpu"``: its one stream does everything.
        mode: which weights a backward uses; in ``"replay"`` a backward that has to run the forward
            again takes that one's time too. The others differ in memory only.
        window: consecutive ticks whose timeline is wanted.
        ticks_in_flight: how far the host enqueues ahead; None: it never waits. It matters where a batch
            goes through many stages in one tick, as in ``ddg``: there 4 ticks are too few for ten
            stages alike.

    Raises:
        TypeError, ValueError: an argument that cannot work.
    """
    whole("batches", batches, 1, "batches")
    if ticks_in_flight is not None:
        whole("ticks_in_flight", ticks_in_flight, 1, "ticks")
    if len(times) != schedule.stages:
        raise ValueError(
            f"times must have one entry per stage; got {len(times)} for {schedule.stages} stages"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    modes = [mode.value for mode in BackwardWeights]
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}; got {mode!r}")
    ticks = schedule.ticks(batches)
    if window is not None and not (window.step == 1 and 0 <= window.start < window.stop <= ticks):
        raise ValueError(
            f"window must be a range of consecutive ticks within the epoch, which has {ticks}; "
            f"got {window}"
        )
    weights = BackwardWeights(mode)
    plan = LAYOUTS[layout](schedule, weights)
    again = replaying(schedule, weights)
    steady = _SteadyTick(schedule, plan)
    run = _core.simulate(
        [
            steady.native(index, _seconds(step, times[step.stage], step.stage in again))
            for index, (step, _) in enumerate(steady.steps)
        ],
        rings=steady.rings,
        streams=len(plan.streams),
        batches=batches,
        ticks=ticks,
        max_ticks_in_flight=ticks_in_flight,
        # And the tick behind it, whose begin ends a timeline's window.
        window=(0, 0) if window is None else (window.start, window.stop + 1),
    )
    ends = np.array(run.tick_ends_s)
    timeline = Timeline(schedule.method, schedule.stages, note="no window was asked for")
    if window is not None:
        spans = list(_spans(schedule, steady.steps, run.spans, batches))
        shown = [span for span in spans if span.tick in window]
        behind = [span for span in spans if span.tick not in window]
        timeline.epochs.append(Epoch(0, shown, behind))
        timeline.lanes = [Lane(plan.stage_of(i), name) for i, name in enumerate(plan.streams)]
        timeline.note = ""
    stages = [plan.stage_of(stream) for stream in range(len(plan.streams))]
    return Simulation(
        seconds=float(ends.max()),
        tick_ends=ends,
        tick_seconds=_steady_seconds(ends[schedule.latency : batches]),
        busy=tuple(run.stream_busy_s[stages.index(k)] for k in range(schedule.stages)),
        timeline=timeline,
    )


class _SteadyTick:
    """One tick far from either end of an epoch.

    ``steps``: with the ticks between a batch's entry and each step on it, in the order of enqueuing.
    ``rings``: how many buffers take turns, for every kind that several streams use. What a single one
    uses makes nothing wait.
    """

    def __init__(self, schedule: Schedule, layout: Layout) -> None:
        self._schedule = schedule
        self._layout = layout
        # Behind the fill, in which plain copies stand for updates; every step is in every such tick
        # but for the updates from several batches, which `native` thins out.
        self._tick = schedule.latency + max(map(schedule.slots, range(schedule.stages)))
        self.steps = [
            (step, self._tick - action.batch)
            for action in replace(schedule, accumulate=1).tick(self._tick)
            for step in layout.steps(action)
        ]
        self.rings: list[int] = []
        self._ring_of: dict[str, int] = {}

    def native(self, index: int, seconds: float) -> _core.PeriodicStep:
        """One of the steps, for the core; it takes ``seconds``."""
        step, offset = self.steps[index]
        return _core.PeriodicStep(
            stream=step.stream,
            duration_s=seconds,
            offset=offset,
            every=self._schedule.accumulate if step.kind is Kind.UPDATE else 1,
            reads=self._accesses(step.reads),
            writes=self._accesses(step.writes),
        )

    def _accesses(self, buffers: Sequence[str]) -> list[tuple[int, int]]:
        return [self._access(buffer) for buffer in buffers if self._layout.is_shared(buffer)]

    def _access(self, buffer: str) -> tuple[int, int]:
        base, _, number = buffer.partition(".")
        if base not in self._ring_of:
            self._ring_of[base] = len(self.rings)
            self.rings.append(copies(buffer, self._schedule))
        ring = self._ring_of[base]
        return ring, (int(number or 0) - self._tick) % self.rings[ring]


def _seconds(step: Step, times: StageTimes, replays: bool) -> float:
    match step.kind:
        case Kind.FORWARD:
            return times.forward
        case Kind.BACKWARD:
            return times.backward + (times.forward if replays else 0.0)
        case Kind.UPDATE:
            return times.update
        case Kind.SEND_ACTIVATION:
            return times.send_activation
        case Kind.SEND_ERROR:
            return times.send_error
        case Kind.COPY_WEIGHTS | Transfer():
            return 0.0


def _spans(
    schedule: Schedule,
    steps: Sequence[tuple[Step, int]],
    spans: Sequence[tuple[int, int, float, float]],
    batches: int,
) -> Iterator[Span]:
    for index, tick, begin, end in spans:
        step, offset = steps[index]
        if isinstance(step.kind, Transfer):
            continue
        # The update of what an epoch has left over comes behind its last batch, of which it is.
        batch = min(tick - offset, batches - 1)
        yield Span(
            code=step.kind.value,
            stage=step.stage,
            stream=step.stream,
            slot=schedule.slot(step.stage, batch),
            tick=tick,
            batch=batch,
            epoch=0,
            begin=begin,
            end=end,
        )


def _steady_seconds(ends: NDArray[np.float64]) -> float:
    """Mean length of the latter half of the ticks that end at ``ends``."""
    if len(ends) < 2:
        return nan
    # Even, since where the host waits, it does so every other tick.
    count = max(1, len(ends) // 4 * 2)
    return float(ends[-1] - ends[-1 - count]) / count
