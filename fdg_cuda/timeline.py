"""What a traced ``fit`` did when: busy shares, waits, and the trace-event JSON of Chrome and Perfetto.

Plain data, no torch. A *lane* is one stream of a stage; a stage's *compute lane* is the one that
forwards and backwards. Times are seconds on one clock that all lanes share.

An epoch's window at a stage begins with the stage's first action in the first recorded tick and ends
where its first action of the tick behind the recorded ones begins. So where every tick is alike the
window is a whole number of ticks long, however far one stage runs ahead of another. Where the
recording reaches into the beginning or the end of an epoch, it begins with the first action of any
stage, or ends with the last. The time between two epochs belongs to no window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import nan
from typing import Any

from fdg_cuda.layout import Transfer
from fdg_cuda.schedule import Kind

COMPUTE = frozenset(
    kind.value for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE, Kind.COPY_WEIGHTS)
)
NAMES: dict[str, str] = {
    str(kind.value): kind.name.lower().replace("_", " ") for kind in (*Kind, *Transfer)
}
COLUMNS = (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)  # of the printed table; the rest is "other"


@dataclass(frozen=True)
class Span:
    """One action at work.

    Attributes:
        code: its letters, as in :class:`fdg_cuda.schedule.Kind` and
            :class:`fdg_cuda.layout.Transfer`.
        stage, stream: where it ran; ``stream`` counts over all stages' streams.
        slot: where the stage held the batch.
        tick, batch: counted from 0 in their epoch.
        epoch: counted from 0 in the traced block.
        begin, end: seconds.
    """

    code: str
    stage: int
    stream: int
    slot: int
    tick: int
    batch: int
    epoch: int
    begin: float
    end: float

    @property
    def label(self) -> str:
        """``1F7``: stage 1 forwards batch 7."""
        return f"{self.stage}{self.code}{self.batch}"

    @property
    def name(self) -> str:
        """``forward``, ``send activation``, ..."""
        return NAMES.get(self.code, self.code)


@dataclass(frozen=True)
class Wait:
    """A gap on a stage's compute lane, within its window."""

    stage: int
    stream: int
    epoch: int
    begin: float
    end: float


@dataclass(frozen=True)
class Lane:
    """One stream: its stage and its name."""

    stage: int
    name: str


@dataclass(frozen=True)
class StageTimeline:
    """What one stage's compute lane did.

    Attributes:
        stage: its index.
        busy: share of the window in which an action was at work, 0 to 1; NaN if nothing was recorded.
        seconds: length of the window.
        work: seconds at work, by the actions' letters.
        waits: the gaps; with ``work`` they fill the window.
    """

    stage: int
    busy: float
    seconds: float
    work: Mapping[str, float]
    waits: tuple[Wait, ...] = field(repr=False)


@dataclass(frozen=True)
class Epoch:
    """The recorded ticks of one epoch.

    Attributes:
        number: counted from 0 in the traced block.
        spans: of the recorded ticks, in any order.
        behind: spans of the tick behind them, whose begin ends the window; may be empty.
    """

    number: int
    spans: Sequence[Span]
    behind: Sequence[Span] = ()

    @cached_property
    def ticks(self) -> int:
        return len({span.tick for span in self.spans})

    @cached_property
    def begin(self) -> float:
        return min(span.begin for span in self.spans)

    @cached_property
    def end(self) -> float:
        """Of whatever is shown: an action, or the wait behind it."""
        return max([*self._marks.values(), *(span.end for span in self.spans)])

    @cached_property
    def _marks(self) -> dict[int, float]:
        """[stage] where its first action of the tick behind begins."""
        marks: dict[int, float] = {}
        for span in self.behind:
            if span.code in COMPUTE:
                marks[span.stage] = min(span.begin, marks.get(span.stage, span.begin))
        return marks

    def compute(self, stage: int) -> list[Span]:
        """The actions on the stage's compute lane, in their order."""
        streams = {s.stream for s in self.spans if s.stage == stage and s.code in COMPUTE}
        return sorted(
            (s for s in self.spans if s.stage == stage and s.stream in streams),
            key=lambda s: (s.begin, s.end),
        )

    def window(self, stage: int) -> tuple[float, float]:
        """The stage's window; see the head of this file."""
        first = min(span.tick for span in self.spans)
        own = [s.begin for s in self.compute(stage) if s.tick == first]
        begin = min(own) if own and first > 0 else self.begin
        return begin, self._marks.get(stage, self.end)


@dataclass(repr=False)
class Timeline:
    """The measured timeline of a traced ``fit``.

    Attributes:
        method: ``"fdg"``, ``"ddg"`` or ``"bp"``.
        stage_count: K.
        epochs: what was recorded of each epoch, the empty ones left out.
        lanes: the streams, by their index.
        note: why nothing, or less than asked for, was recorded; empty if all was.
    """

    method: str
    stage_count: int
    epochs: list[Epoch] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    note: str = "no fit has run in the traced block yet"

    @property
    def spans(self) -> list[Span]:
        """Every recorded action, by its begin."""
        spans = [span for epoch in self.epochs for span in epoch.spans]
        return sorted(spans, key=lambda span: (span.begin, span.end))

    @property
    def ticks(self) -> int:
        """Recorded ticks."""
        return sum(epoch.ticks for epoch in self.epochs)

    @property
    def partial_ticks(self) -> int:
        """Recorded ticks of fill or drain, in which some stage has nothing to forward or backward."""
        busy = Counter(
            (span.epoch, span.tick)
            for span in self.spans
            if span.code in (Kind.FORWARD.value, Kind.BACKWARD.value)
        )
        return self.ticks - sum(n == 2 * self.stage_count for n in busy.values())

    @property
    def seconds(self) -> float:
        """From the first begin to the last end, without the time between epochs."""
        return sum(epoch.end - epoch.begin for epoch in self.epochs)

    @property
    def stages(self) -> list[StageTimeline]:
        """One per stage, in order."""
        return [self._stage(stage) for stage in range(self.stage_count)]

    @property
    def bubble(self) -> float:
        """One minus the mean of the stages' busy shares; NaN if nothing was recorded."""
        return 1 - sum(stage.busy for stage in self.stages) / self.stage_count

    def _stage(self, stage: int) -> StageTimeline:
        work: dict[str, float] = {}
        waits: list[Wait] = []
        seconds = 0.0
        for epoch in self.epochs:
            begin, end = epoch.window(stage)
            seconds += end - begin
            at = begin
            spans = epoch.compute(stage)
            stream = spans[0].stream if spans else self._compute_stream(stage)
            for span in spans:
                if span.begin > at:
                    waits.append(Wait(stage, stream, epoch.number, at, span.begin))
                work[span.code] = work.get(span.code, 0.0) + span.end - span.begin
                at = span.end
            if end > at:
                waits.append(Wait(stage, stream, epoch.number, at, end))
        busy = sum(work.values()) / seconds if seconds > 0 else nan
        return StageTimeline(stage, busy, seconds, work, tuple(waits))

    def _compute_stream(self, stage: int) -> int:
        """Of a stage that did nothing: its first stream."""
        return next(i for i, lane in enumerate(self.lanes) if lane.stage == stage)

    def __str__(self) -> str:
        head = f"{self.method}, {self.stage_count} stage{'s' * (self.stage_count > 1)}"
        if not self.epochs:
            return f"{head}: nothing was recorded ({self.note})"
        lines = [
            f"{head}: {self.ticks} tick{'s' * (self.ticks > 1)} in {self.seconds:.3f} s, "
            f"bubble {100 * self.bubble:.1f} %",
            f"{'':7}{'':>9}   milliseconds per tick",
            f"{'stage':7}{'busy':>9}"
            + "".join(f"{name:>11}" for name in (*(NAMES[k.value] for k in COLUMNS), "other"))
            + f"{'wait':>11}",
        ]
        for stage in self.stages:
            columns = [stage.work.get(kind.value, 0.0) for kind in COLUMNS]
            total = sum(stage.work.values())
            columns += [total - sum(columns), stage.seconds - total]
            lines.append(
                f"{stage.stage:<7}{100 * stage.busy:>7.1f} %"
                + "".join(f"{abs(1e3 * s / self.ticks):>11.3f}" for s in columns)
            )
        if self.partial_ticks:
            lines.append(
                f"{self.partial_ticks} of these ticks are fill or drain, in which some stages have "
                f"nothing to do; trace longer epochs to see the steady state"
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Timeline of {self.method}, {self.stage_count} stages, {self.ticks} ticks>"

    # -- trace events ---------------------------------------------------------------------------

    def to_chrome(self) -> dict[str, Any]:
        """The trace-event JSON that https://ui.perfetto.dev and chrome://tracing open.

        One process per stage, one thread per lane, in microseconds since the first event.
        """
        return {
            "displayTimeUnit": "ms",
            "otherData": {
                "method": self.method,
                "stages": self.stage_count,
                "ticks": self.ticks,
                "bubble": self.bubble if self.epochs else None,
                "busy": [stage.busy for stage in self.stages] if self.epochs else None,
            },
            "traceEvents": [*self._names(), *self._events()],
        }

    # Viewers take process and thread 0 for the idle one, so both are counted from 1 there.
    def _names(self) -> Iterator[dict[str, Any]]:
        def named(what: str, stage: int, stream: int, **args: Any) -> dict[str, Any]:
            return {"ph": "M", "name": what, "pid": stage + 1, "tid": stream + 1, "args": args}

        lanes = sorted(enumerate(self.lanes), key=lambda entry: (entry[1].stage, entry[0]))
        for stage, members in groupby(lanes, key=lambda entry: entry[1].stage):
            for position, (stream, lane) in enumerate(members):
                if position == 0:
                    yield named("process_name", stage, stream, name=f"stage {stage}")
                    yield named("process_sort_index", stage, stream, sort_index=stage)
                yield named("thread_name", stage, stream, name=lane.name)
                yield named("thread_sort_index", stage, stream, sort_index=stream)

    def _events(self) -> list[dict[str, Any]]:
        if not self.epochs:
            return []
        origin = min(epoch.begin for epoch in self.epochs)

        def event(at: Span | Wait, name: str, category: str, **args: int) -> dict[str, Any]:
            # Both ends are rounded, not the length: neighbours touch and never overlap.
            begin, end = (round(1e9 * (time - origin)) for time in (at.begin, at.end))
            return {
                "ph": "X",
                "name": name,
                "cat": category,
                "ts": begin / 1e3,
                "dur": (end - begin) / 1e3,
                "pid": at.stage + 1,
                "tid": at.stream + 1,
                "args": {**args, "epoch": at.epoch},
            }

        events = [
            event(span, span.label, span.name, tick=span.tick, batch=span.batch, slot=span.slot)
            for span in self.spans
        ]
        events += [event(wait, "wait", "wait") for stage in self.stages for wait in stage.waits]
        return sorted(events, key=lambda event: (event["ts"], event["pid"], event["tid"]))
