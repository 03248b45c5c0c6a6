"""``simulate``: the very schedule, timed as the waits of the very program say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

import benchmarks.simulation
from fdg_cuda._core import Operation, OperationKind, Scheduler
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.program import NoWork, Program
from fdg_cuda.schedule import METHODS, Kind, Schedule
from fdg_cuda.simulation import LAYOUTS, Simulation, StageTimes, simulate
from fdg_cuda.timeline import Span
from fdg_cuda.timeline_picture import draw

MODES = [mode.value for mode in BackwardWeights]
FIELDS = ("forward", "backward", "update", "send_activation", "send_error")


def random_times(stages: int, seed: object) -> list[StageTimes]:
    """Each kind of work between nothing and much, so that now computing and now a link is slowest."""
    draw = random.Random(str(seed))
    scale = {field: draw.choice((0.2, 1.0, 3.0)) for field in FIELDS}
    return [StageTimes(**{f: scale[f] * draw.random() for f in FIELDS}) for _ in range(stages)]


def even_times(stages: int, **seconds: float) -> list[StageTimes]:
    """Of every stage 1, 2 and a half second, sums of which are exact, or what is given."""
    return [StageTimes(**{"forward": 1.0, "backward": 2.0, "update": 0.5, **seconds})] * stages


def all_spans(
    schedule: Schedule, times: Sequence[StageTimes], batches: int, **options: Any
) -> tuple[Simulation, Sequence[Span]]:
    run = simulate(schedule, times, batches, window=range(schedule.ticks(batches)), **options)
    return run, run.timeline.epochs[0].spans


# -- an independent replay ------------------------------------------------------------------------


def operations_of(schedule: Schedule, batches: int, layout: str, mode: str) -> list[Operation]:
    """What the real program enqueues."""
    plan = LAYOUTS[layout](schedule, BackwardWeights(mode))
    scheduler = Scheduler("trace", plan.streams)
    program = Program(schedule, plan, scheduler, [NoWork() for _ in range(schedule.stages)])
    for tick in range(schedule.ticks(batches)):
        program.submit(tick, batches if tick >= batches else None)
    scheduler.synchronize()
    return scheduler.operations()


def replay(
    operations: Sequence[Operation], seconds: Callable[[Operation], float], most: int | None
) -> tuple[list[tuple[Operation, float, float]], list[float]]:
    """(run, begin, end) of every run, and every tick's end. Streams and events, and nothing else:
    ``most`` ticks may be unfinished, or the host waits until half of them have ended."""
    free: dict[int, float] = {}
    recorded: dict[tuple[int, int], float] = {}
    runs = []
    unfinished: list[int] = []
    ends: dict[int, float] = {}
    host = 0.0
    for o in operations:
        if o.kind == OperationKind.wait:
            free[o.stream] = max(free.get(o.stream, 0.0), recorded[o.event, o.ticket])
        elif o.kind == OperationKind.record:
            recorded[o.event, o.ticket] = free[o.stream]
        else:
            if o.tick not in ends:
                if most is not None and len(unfinished) == most:
                    while len(unfinished) > most // 2:
                        host = max(host, ends[unfinished.pop(0)])
                unfinished.append(o.tick)
                ends[o.tick] = host
            begin = max(free.get(o.stream, 0.0), host)
            free[o.stream] = begin + seconds(o)
            ends[o.tick] = max(ends[o.tick], free[o.stream])
            runs.append((o, begin, free[o.stream]))
    return runs, [ends[tick] for tick in sorted(ends)]


def seconds_of(
    times: Sequence[StageTimes], schedule: Schedule, mode: str
) -> Callable[[Operation], float]:
    by_code = dict(zip("FBUAE", FIELDS, strict=True))

    def seconds(o: Operation) -> float:
        own = times[o.stage]
        if o.code == "B" and mode == "replay" and schedule.slots(o.stage) > 1:
            return own.backward + own.forward
        return getattr(own, by_code[o.code]) if o.code in by_code else 0.0

    return seconds


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_times_are_those_of_the_program_that_trains(
    method: str, layout: str, accumulate: int
) -> None:
    for stages, batches, seed in product(range(1, 6), (1, 5, 12), range(3)):
        schedule = Schedule(method, stages, accumulate)
        times = random_times(stages, (method, layout, stages, batches, seed))
        mode = MODES[seed % len(MODES)]
        operations = operations_of(schedule, batches, layout, mode)
        for most in (None, 1, 2, 3, 4):
            run, spans = all_spans(
                schedule, times, batches, layout=layout, mode=mode, ticks_in_flight=most
            )
            runs, ends = replay(operations, seconds_of(times, schedule, mode), most)
            assert [(s.label, s.stream, s.tick, s.slot, s.begin, s.end) for s in spans] == [
                (f"{o.stage}{o.code}{o.batch}", o.stream, o.tick, o.slot, begin, end)
                for o, begin, end in runs
                if o.code in "FBUAE"
            ]
            assert run.tick_ends.tolist() == ends
            assert run.seconds == max(ends)


@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_every_tick_is_that_of_the_schedule(method: str, accumulate: int) -> None:
    for stages, batches in product(range(1, 6), (1, 5, 12)):
        schedule = Schedule(method, stages, accumulate)
        _, spans = all_spans(schedule, random_times(stages, 0), batches)
        assert [(span.tick, span.label, span.slot) for span in spans] == [
            (tick, str(action), action.slot)
            for tick, actions in enumerate(schedule.epoch(batches))
            for action in actions
            if action.kind is not Kind.COPY_WEIGHTS
        ]


# -- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_one_stage_takes_the_sum(method: str, layout: str) -> None:
    run = simulate(Schedule(method, 1), even_times(1), 9, layout=layout)
    assert run.tick_seconds == 3.5
    assert run.seconds == 9 * 3.5
    assert run.busy == (9 * 3.5,)


@pytest.mark.parametrize("stages", [2, 3, 5, 8])
def test_the_slowest_stage_the_sum_and_what_is_between(stages: int) -> None:
    times = [StageTimes(1.0 + k % 3, 2.0 + k % 2, 0.5) for k in range(stages)]
    sums = [t.forward + t.backward + t.update for t in times]
    tick = {m: simulate(Schedule(m, stages), times, 200).tick_seconds for m in METHODS}
    assert tick["fdg"] == max(sums)
    # Behind the last backward the next batch's forward need not wait for the updates above.
    assert tick["bp"] == sum(t.forward + t.backward for t in times) + times[0].update
    assert tick["fdg"] <= tick["ddg"] < tick["bp"]


@pytest.mark.parametrize("method", ["fdg", "ddg"])
def test_a_slow_link_makes_the_tick_its_own(method: str) -> None:
    times = even_times(4)
    times[2] = replace(times[2], send_activation=20.0)
    assert simulate(Schedule(method, 4), times, 60).tick_seconds == 20.0
    times[2] = replace(times[2], send_activation=0.0, send_error=20.0)
    # The next backward makes its error signal where this one is sent from.
    assert simulate(Schedule(method, 4), times, 60).tick_seconds == 20.0 + times[2].backward


def test_sends_cost_nothing_while_they_fit_into_an_update() -> None:
    """In two ticks the last stage but one sends to the last and gets an answer, for which only the
    update of the last stage is not needed."""
    for activation, error, ticks in (
        (0.25, 0.125, {"cuda": 3.5, "cpu": 3.875}),
        (0.5, 0.25, {"cuda": (3.5 + 0.5 + 3.0 + 0.25) / 2, "cpu": 3.5 + 0.5 + 0.25}),
    ):
        times = even_times(3, send_activation=activation, send_error=error)
        for layout in LAYOUTS:
            run = simulate(Schedule("fdg", 3), times, 60, layout=layout)
            assert run.tick_seconds == ticks[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_what_takes_longer_ends_no_action_sooner(method: str, layout: str) -> None:
    draw = random.Random(7)
    for seed in range(40):
        schedule = Schedule(method, draw.randint(1, 5), draw.randint(1, 3))
        times = random_times(schedule.stages, seed)
        slower = list(times)
        k, field = draw.randrange(schedule.stages), draw.choice(FIELDS)
        slower[k] = replace(times[k], **{field: getattr(times[k], field) + draw.random()})
        run, spans = all_spans(schedule, times, 9, layout=layout)
        run_slower, spans_slower = all_spans(schedule, slower, 9, layout=layout)
        assert (run_slower.tick_ends >= run.tick_ends).all()
        for a, b in zip(spans, spans_slower, strict=True):
            assert (b.begin, b.end) >= (a.begin, a.end)


def test_the_host_slows_ddg_over_many_stages_and_fdg_never() -> None:
    """In ``ddg`` a batch goes through all stages in a tick, and the host must be ahead of it."""
    times = even_times(32)
    for method, slowed in (("fdg", False), ("ddg", True)):
        tick = [
            simulate(Schedule(method, 32), times, 300, ticks_in_flight=most).tick_seconds
            for most in (None, 4)
        ]
        assert tick[0] == pytest.approx(3.5, rel=0.01)
        assert (tick[1] > 2 * tick[0]) == slowed


def test_replay_adds_a_forward_where_a_stage_holds_several_batches() -> None:
    schedule = Schedule("fdg", 2)
    times = even_times(2)
    busy = {mode: simulate(schedule, times, 10, mode=mode).busy for mode in MODES}
    assert busy == {"stash": (35.0, 35.0), "current": (35.0, 35.0), "replay": (45.0, 35.0)}


def test_updates_from_several_batches_take_their_time_when_they_come() -> None:
    run = simulate(Schedule("fdg", 2, accumulate=4), even_times(2), 10)
    assert run.busy == (31.5, 31.5)  # three updates, one of them of what is left
    assert len(run.tick_ends) == 13


def test_a_tick_needs_a_steady_state() -> None:
    schedule = Schedule("fdg", 3)
    assert math.isnan(simulate(schedule, even_times(3), 5).tick_seconds)
    assert simulate(schedule, even_times(3), 6).tick_seconds > 0


def test_a_thousand_stages() -> None:
    times = even_times(1024)
    run = simulate(Schedule("fdg", 1024), times, 2100)
    assert len(run.tick_ends) == 2100 + 2046
    assert run.tick_seconds == 3.5
    assert run.busy == (2100 * 3.5,) * 1024


def test_the_benchmark_counts_its_ticks() -> None:
    row = benchmarks.simulation.measure("ddg", "cpu", stages=3, ticks=40, rounds=2)
    assert (row["method"], row["layout"], row["n"]) == ("ddg", "cpu", 2)
    assert 0 <= row["q1"] <= row["median"] <= row["q3"]


# -- the timeline ---------------------------------------------------------------------------------


def test_the_timeline_of_a_window_can_be_drawn(tmp_path: Path) -> None:
    schedule = Schedule("fdg", 3)
    times = even_times(3, send_activation=0.25, send_error=0.125)
    timeline = simulate(schedule, times, 30, window=range(10, 16)).timeline
    assert timeline.ticks == 6
    assert timeline.partial_ticks == 0
    assert {span.tick for span in timeline.epochs[0].behind} == {16}
    for stage in timeline.stages:
        assert stage.seconds == 21.0
        assert stage.busy == 1.0
        assert stage.work == {"F": 6.0, "B": 12.0, "U": 3.0}
    assert [lane.name for lane in timeline.lanes[:2]] == ["stage 0", "stage 0 send"]
    assert str(timeline).startswith("fdg, 3 stages: 6 ticks in")
    draw(tmp_path / "timeline.png", timeline)
    assert (tmp_path / "timeline.png").stat().st_size > 5000


def test_without_a_window_there_is_no_timeline() -> None:
    timeline = simulate(Schedule("fdg", 2), even_times(2), 5).timeline
    assert timeline.epochs == []
    assert "window" in str(timeline)


def test_a_window_is_what_the_whole_shows_of_it() -> None:
    schedule = Schedule("ddg", 3, accumulate=2)
    times = random_times(3, 5)
    _, spans = all_spans(schedule, times, 9)
    window = range(8, schedule.ticks(9))
    timeline = simulate(schedule, times, 9, window=window).timeline
    wanted = [span for span in spans if span.tick in window]
    assert list(timeline.epochs[0].spans) == wanted
    assert timeline.epochs[0].behind == []


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_times_are_checked(seconds: float) -> None:
    with refused(ValueError, "send_error must be 0 or more seconds", str(seconds)):
        StageTimes(1.0, 1.0, 1.0, send_error=seconds)


def simulated(**changes: Any) -> Simulation:
    arguments = {"times": even_times(2), "batches": 4, **changes}
    return simulate(Schedule("fdg", 2), **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"times": even_times(3)}, "one entry per stage; got 3 for 2 stages"),
        ({"batches": 0}, "batches must be 1 or more"),
        ({"layout": "tpu"}, "layout must be one of cpu, cuda; got 'tpu'"),
        ({"mode": "new"}, "mode must be one of stash, current, replay; got 'new'"),
        ({"window": range(0)}, "window must be a range of consecutive ticks"),
        ({"window": range(3, 7)}, "the epoch, which has 6; got range(3, 7)"),
        ({"window": range(0, 4, 2)}, "consecutive"),
        ({"ticks_in_flight": 0}, "ticks_in_flight must be 1 or more"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], words: str) -> None:
    with refused(ValueError, words):
        simulated(**changes)
