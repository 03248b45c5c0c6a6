"""``runner.trace``: what is measured, what is made of it, and that training does not notice."""

from __future__ import annotations

import builtins
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chains import FEATURES, batches, even_split, mlp, same_bits
from refusals import refused
from torch import Tensor, nn
from traps import Scene, TroubleError

from fdg_cuda import FDGRunner, Timeline
from fdg_cuda.recorder import SKIPPED_BEYOND_FILL
from fdg_cuda.schedule import METHODS
from fdg_cuda.timeline import Epoch, Lane, Span
from fdg_cuda.timeline_picture import draw

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Sleep(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x


def runner_of(stages: int = 2, **options: Any) -> FDGRunner:
    model = mlp()
    return FDGRunner(
        model, ["cpu"] * stages, split=even_split(len(model), stages), lr=0.05, **options
    )


def sleeping_runner(*seconds: float, method: str) -> FDGRunner:
    layers = [layer for s in seconds for layer in (nn.Linear(FEATURES, FEATURES), Sleep(s))]
    split = [2 * stage for stage in range(1, len(seconds))]
    return FDGRunner(
        nn.Sequential(*layers).double(), ["cpu"] * len(seconds), split=split, method=method
    )


def check_files(path: Path) -> list[dict[str, Any]]:
    """The complete events of the JSON, which is sound, and beside which there is a picture."""
    trace = json.loads(path.read_text())
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    times = [event["ts"] for event in events]
    assert times == sorted(times)
    assert times[0] == 0
    ends: dict[tuple[int, int], float] = {}
    for event in events:
        assert event.keys() == {"ph", "name", "cat", "ts", "dur", "pid", "tid", "args"}
        assert event["dur"] >= 0
        lane = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(lane, 0) - 1e-3  # rounded to nanoseconds
        ends[lane] = event["ts"] + event["dur"]
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(PNG_SIGNATURE)
    assert len(picture) > 5000
    return events


# -- what is measured -----------------------------------------------------------------------------


def test_busy_shares_of_unequal_stages(tmp_path: Path) -> None:
    """30 and 10 ms in every forward: the second stage has work for a third of the time."""
    runner = sleeping_runner(0.03, 0.01, method="fdg")
    with runner.trace(tmp_path / "trace.json", ticks=15) as timeline:
        runner.fit(batches(25))
    slow, fast = timeline.stages
    assert 0.75 < slow.busy <= 1
    assert 0.15 < fast.busy < 0.6
    assert timeline.bubble == pytest.approx(1 - (slow.busy + fast.busy) / 2)
    for stage in timeline.stages:
        at_work = sum(stage.work.values())
        waiting = sum(wait.end - wait.begin for wait in stage.waits)
        assert at_work + waiting == pytest.approx(stage.seconds)
        assert stage.busy == pytest.approx(at_work / stage.seconds)
    assert slow.work["F"] >= 15 * 0.03
    assert fast.work["F"] >= 15 * 0.01
    check_files(tmp_path / "trace.json")


def test_stages_that_take_turns_leave_bubbles() -> None:
    runner = sleeping_runner(0.02, 0.02, method="bp")
    with runner.trace(ticks=6) as timeline:
        runner.fit(batches(15))
    assert 0.3 < timeline.bubble < 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_action_of_the_window_once(method: str, stages: int, tmp_path: Path) -> None:
    runner = runner_of(stages, method=method)
    runner._machine.injected_delays = (stages, 400)
    skip, ticks, count = 3, 5, 12
    with runner.trace(tmp_path / "trace.json", ticks=ticks, skip=skip) as timeline:
        runner.fit(batches(count))
    expected = Counter(
        (tick, str(action), action.slot)
        for tick in range(skip, skip + ticks)
        for action in runner.schedule.tick(tick, count)
    )
    assert Counter((span.tick, span.label, span.slot) for span in timeline.spans) == expected
    assert timeline.ticks == ticks
    for stream in range(stages):
        lane = [span for span in timeline.spans if span.stream == stream]
        assert all(span.stage == stream for span in lane)
        assert all(span.begin <= span.end for span in lane)
        assert all(a.end <= b.begin for a, b in pairwise(lane))

    events = check_files(tmp_path / "trace.json")
    written = Counter(
        (event["args"]["tick"], event["name"], event["args"]["slot"])
        for event in events
        if event["name"] != "wait"
    )
    assert written == expected
    names = {"forward", "backward", "update", "send activation", "send error", "wait"}
    some = {"F": "forward", "B": "backward", "U": "update", "A": "send activation"}
    for event in events:
        assert event["cat"] in {*names, "copy weights"}
        if event["name"] != "wait":
            assert event["cat"] == some.get(event["name"][1], event["cat"])
            assert int(event["name"][2:]) == event["args"]["batch"]
            assert event["pid"] == int(event["name"][0]) + 1


def test_what_is_ordered_does_not_overlap() -> None:
    """In bp nothing overlaps: every stage's clock is the same one."""
    runner = runner_of(3, method="bp")
    runner._machine.injected_delays = (1, 300)
    with runner.trace(ticks=10, skip=0) as timeline:
        runner.fit(batches(10))
    forwards = [s for s in timeline.spans if s.code in "FBAE"]
    assert all(a.end <= b.begin for a, b in pairwise(forwards))


def test_the_whole_fit_with_fill_and_drain() -> None:
    runner = runner_of(3)
    with runner.trace(ticks=1000, skip=0) as timeline:
        runner.fit(batches(9))
    expected = Counter(str(action) for tick in runner.schedule.epoch(9) for action in tick)
    assert Counter(span.label for span in timeline.spans) == expected
    assert timeline.ticks == 9 + runner.schedule.latency
    begin, end = timeline.epochs[0].begin, timeline.epochs[0].end
    assert all(stage.seconds == pytest.approx(end - begin) for stage in timeline.stages)


def test_the_fill_is_skipped_by_default() -> None:
    runner = runner_of(3)
    with runner.trace(ticks=4) as timeline:
        runner.fit(batches(30))
    first = runner.schedule.latency + SKIPPED_BEYOND_FILL
    assert {span.tick for span in timeline.spans} == set(range(first, first + 4))


def test_ticks_are_counted_over_epochs_and_the_time_between_them_is_left_out(
    tmp_path: Path,
) -> None:
    runner = runner_of(2)
    per_epoch = 6 + runner.schedule.latency
    between = 0.5
    with runner.trace(tmp_path / "trace.json", ticks=per_epoch + 2, skip=per_epoch - 1) as timeline:
        runner.fit(batches(6), epochs=4, on_epoch=lambda _: time.sleep(between))
    recorded = sorted({(span.epoch, span.tick) for span in timeline.spans})
    assert recorded == [(0, per_epoch - 1), *((1, tick) for tick in range(per_epoch)), (2, 0)]
    last, first = timeline.epochs[0], timeline.epochs[1]
    assert first.begin - last.end >= between
    assert timeline.seconds == pytest.approx(sum(e.end - e.begin for e in timeline.epochs))
    assert timeline.spans[-1].end - timeline.spans[0].begin >= timeline.seconds + 2 * between - 0.1
    check_files(tmp_path / "trace.json")


def test_a_window_that_ends_with_an_epoch() -> None:
    runner = runner_of(2)
    per_epoch = 5 + runner.schedule.latency
    with runner.trace(ticks=per_epoch, skip=0) as timeline:
        runner.fit(batches(5), epochs=2)
    assert len(timeline.epochs) == 1
    assert timeline.ticks == per_epoch


def test_several_fits_in_one_block() -> None:
    runner = runner_of(2)
    with runner.trace(ticks=1000, skip=0) as timeline:
        runner.fit(batches(4))
        first = timeline.ticks
        runner.fit(batches(5))
    assert timeline.ticks == 2 * first + 1
    assert [epoch.number for epoch in timeline.epochs] == [0, 1]


def test_it_can_be_read_between_epochs() -> None:
    runner = runner_of(2)
    bubbles = []
    with runner.trace(ticks=1000, skip=0) as timeline:
        assert math.isnan(timeline.bubble)
        runner.fit(batches(4), epochs=2, on_epoch=lambda _: bubbles.append(timeline.bubble))
    assert all(0 <= bubble < 1 for bubble in bubbles)


def test_memory_is_bounded_by_ticks() -> None:
    runner = runner_of(2)
    with runner.trace(ticks=3, skip=0) as timeline:
        runner.fit(batches(200, last=None))
    assert len(timeline.spans) <= 3 * 2 * 6
    assert len(timeline.epochs[0].behind) <= 2 * 6


@pytest.mark.parametrize("method", METHODS)
def test_training_does_not_notice(method: str) -> None:
    plain, traced = runner_of(3, method=method), runner_of(3, method=method)
    losses = plain.fit(batches(12), epochs=2).batch_losses
    with traced.trace(ticks=10):
        assert traced.fit(batches(12), epochs=2).batch_losses == losses
    assert same_bits(plain.state_dict(), traced.state_dict())


def test_a_fit_behind_the_block_is_not_traced() -> None:
    runner = runner_of(2)
    with runner.trace(ticks=1000, skip=0) as timeline:
        runner.fit(batches(4))
    spans = len(timeline.spans)
    runner.fit(batches(4))
    assert len(timeline.spans) == spans


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["forward 1", "backward 0", "loss", "loader"])
def test_what_was_recorded_is_written_when_fit_raises(place: str, tmp_path: Path) -> None:
    scene = Scene(20)
    scene.set(place, 8)  # by then tick 2 is surely done
    runner = scene.runner()
    path = tmp_path / "trace.json"
    with (
        pytest.raises(TroubleError, match=place.split()[0]),
        runner.trace(path, skip=0) as timeline,
    ):
        runner.fit(scene.loader)
    assert any(span.label == "0F2" for span in timeline.spans)
    check_files(path)
    scene.disarm()
    with runner.trace(ticks=2, skip=1) as timeline:  # the runner can be traced again
        runner.fit(scene.loader)
    assert timeline.ticks == 2


def test_non_finite_loss(tmp_path: Path) -> None:
    runner = runner_of(2)
    data = batches(8)
    data[4][0].fill_(math.inf)
    with pytest.raises(ArithmeticError), runner.trace(tmp_path / "trace.json", skip=0):
        runner.fit(data)
    check_files(tmp_path / "trace.json")


def test_ctrl_c(tmp_path: Path) -> None:
    runner = runner_of(2)

    def interrupt(result: Any) -> None:
        if result.batch == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), runner.trace(tmp_path / "t.json", skip=0) as timeline:
        runner.fit(batches(200), on_batch=interrupt)
    assert 5 < timeline.ticks < 30
    check_files(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        (lambda runner: None, ["no fit", "call fit inside"]),
        (lambda runner: runner.fit(batches(3)), ["took 5 ticks", "first 40", "smaller skip"]),
    ],
    ids=["no-fit", "too-few-ticks"],
)
def test_nothing_recorded_says_so(
    inside: Callable[[FDGRunner], object],
    words: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = runner_of(2)
    path = tmp_path / "trace.json"
    with caplog.at_level(logging.WARNING), runner.trace(path, skip=40) as timeline:
        assert "nothing was recorded" in str(timeline)
        inside(runner)
    for word in ["nothing was", *words]:
        assert word in str(timeline)
    for word in ["no file is written", *words]:
        assert word in caplog.text
    assert not path.exists()
    assert math.isnan(timeline.bubble)
    assert [stage.stage for stage in timeline.stages] == [0, 1]
    assert all(math.isnan(stage.busy) for stage in timeline.stages)
    assert timeline.spans == []
    json.loads(json.dumps(timeline.to_chrome(), allow_nan=False))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ticks": 0}, ValueError, ["ticks", "1 or more", "0"]),
        ({"ticks": -3}, ValueError, ["ticks", "1 or more", "-3"]),
        ({"ticks": 2.5}, TypeError, ["ticks", "whole number", "2.5"]),
        ({"ticks": None}, TypeError, ["ticks", "whole number", "None"]),
        ({"ticks": True}, TypeError, ["ticks", "whole number", "True"]),
        ({"skip": -1}, ValueError, ["skip", "0 or more", "-1"]),
        ({"skip": "3"}, TypeError, ["skip", "whole number", "'3'"]),
        ({"path": 7}, TypeError, ["path", "file name", "7"]),
        ({"path": "trace"}, ValueError, ["path", ".json", "'trace'"]),
        ({"path": "trace.png"}, ValueError, ["path", ".json", "'trace.png'"]),
        ({"path": ""}, ValueError, ["path", ".json", "''"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    runner = runner_of(2)
    with refused(error, *words):
        runner.trace(**arguments)  # before the block is entered


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with refused(ValueError, "folder", "out.json"):
        runner_of(2).trace(tmp_path / "out.json")


def test_folders_are_made_before_training(tmp_path: Path) -> None:
    runner = runner_of(2)
    with runner.trace(tmp_path / "a" / "b" / "trace.json", skip=0):
        assert (tmp_path / "a" / "b").is_dir()
        runner.fit(batches(3))
    check_files(tmp_path / "a" / "b" / "trace.json")


def test_nested() -> None:
    runner = runner_of(2)
    with (
        runner.trace(ticks=2, skip=0) as timeline,
        refused(RuntimeError, "inside another trace", "one trace at a time"),
        runner.trace(),
    ):
        pass
    with runner.trace(ticks=2, skip=0) as timeline:
        runner.fit(batches(3))
    assert timeline.ticks == 2


def test_two_runners_at_once() -> None:
    one, two = runner_of(2), runner_of(1)
    with one.trace(skip=0) as first, two.trace(skip=0) as second:
        one.fit(batches(3))
        two.fit(batches(4))
    assert (first.ticks, second.ticks) == (5, 4)


def test_while_fit_is_running() -> None:
    runner = runner_of(2)

    def enter(_: object) -> None:
        with runner.trace():
            pass

    with refused(RuntimeError, "while fit is running", "around fit"):
        runner.fit(batches(3), on_epoch=enter)


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_import = builtins.__import__

    def no_picture(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "fdg_cuda.timeline_picture":
            raise ImportError("No module named 'matplotlib'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_picture)
    runner = runner_of(2)
    with caplog.at_level(logging.WARNING), runner.trace(tmp_path / "trace.json", skip=0):
        runner.fit(batches(3))
    assert "pip install matplotlib" in caplog.text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert not (tmp_path / "trace.png").exists()


# -- what is made of it ---------------------------------------------------------------------------


def span(code: str, stage: int, tick: int, begin: float, end: float, stream: int = -1) -> Span:
    stream = stage if stream < 0 else stream
    return Span(code, stage, stream, slot=0, tick=tick, batch=tick, epoch=0, begin=begin, end=end)


def timeline_of(spans: list[Span], behind: list[Span], lanes: list[Lane]) -> Timeline:
    stages = 1 + max(lane.stage for lane in lanes)
    return Timeline("fdg", stages, [Epoch(0, spans, behind)], lanes)


def test_a_stage_that_runs_ahead_is_no_less_busy() -> None:
    """Stage 0 is two ticks ahead; both work 3 of 4 seconds in every tick."""
    ticks = range(5, 10)
    lead = 8.0
    timeline = timeline_of(
        [span("F", k, t, 4 * t + lead * k, 4 * t + lead * k + 3) for k in (0, 1) for t in ticks],
        [span("F", k, 10, 40 + lead * k, 43 + lead * k) for k in (0, 1)],
        [Lane(0, "stage 0"), Lane(1, "stage 1")],
    )
    assert [stage.busy for stage in timeline.stages] == pytest.approx([0.75, 0.75])
    assert [stage.seconds for stage in timeline.stages] == pytest.approx([20, 20])
    assert timeline.seconds == pytest.approx(28)
    assert [len(stage.waits) for stage in timeline.stages] == [5, 5]


def test_fill_and_drain_are_in_the_window() -> None:
    timeline = timeline_of(
        [span("F", 0, 0, 1.0, 2.0), span("F", 1, 1, 2.0, 4.0), span("B", 0, 2, 4.0, 5.0)],
        [],
        [Lane(0, "stage 0"), Lane(1, "stage 1")],
    )
    assert [stage.busy for stage in timeline.stages] == pytest.approx([0.5, 0.5])
    first, second = (stage.waits for stage in timeline.stages)
    assert [(wait.begin, wait.end) for wait in first] == [(2.0, 4.0)]
    assert [(wait.begin, wait.end) for wait in second] == [(1.0, 2.0), (4.0, 5.0)]


def test_copy_lanes_are_shown_and_do_not_count_as_compute(tmp_path: Path) -> None:
    """A device may send on streams of their own."""
    lanes = [Lane(0, "stage 0"), Lane(1, "stage 1"), Lane(0, "send"), Lane(1, "receive")]
    spans = [
        span("F", 0, 0, 0.0, 1.0),
        span("A", 0, 0, 1.0, 3.0, stream=2),
        span("F", 0, 1, 1.5, 2.0),
        span("R", 1, 0, 1.0, 3.0, stream=3),
    ]
    timeline = timeline_of(spans, [], lanes)
    assert timeline.stages[0].busy == pytest.approx(0.5)
    assert timeline.stages[0].work == {"F": 1.5}
    assert timeline.stages[1].busy == 0
    trace = timeline.to_chrome()["traceEvents"]
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace
        if event["name"] == "thread_name"
    }
    assert threads == {(1, 1): "stage 0", (2, 2): "stage 1", (1, 3): "send", (2, 4): "receive"}
    processes = {e["pid"]: e["args"]["name"] for e in trace if e["name"] == "process_name"}
    assert processes == {1: "stage 0", 2: "stage 1"}
    assert {(e["pid"], e["tid"]) for e in trace if e["ph"] == "X"} == set(threads)
    draw(tmp_path / "lanes.png", timeline)
    assert (tmp_path / "lanes.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_printed_table() -> None:
    timeline = timeline_of(
        [span("F", 0, 0, 0.0, 0.010), span("B", 0, 0, 0.015, 0.020), span("U", 0, 1, 0.030, 0.040)],
        [],
        [Lane(0, "stage 0")],
    )
    timeline.note = ""
    assert timeline.partial_ticks == 1  # of the two: the second has an update alone
    head, _, names, row, partial = str(timeline).splitlines()
    assert partial.startswith("1 of these ticks are fill or drain")
    assert head == "fdg, 1 stage: 2 ticks in 0.040 s, bubble 37.5 %"
    assert names.split() == ["stage", "busy", "forward", "backward", "update", "other", "wait"]
    assert row.split() == ["0", "62.5", "%", "5.000", "2.500", "5.000", "0.000", "7.500"]


def test_many_ticks_are_drawn_in_part(tmp_path: Path) -> None:
    ticks = range(3000)
    spans = [span("F", 0, t, 1e-2 * t, 1e-2 * t + 8e-3) for t in ticks]
    timeline = timeline_of(spans, [], [Lane(0, "stage 0")])
    draw(tmp_path / "long.png", timeline)
    assert 5_000 < len((tmp_path / "long.png").read_bytes()) < 1_000_000


def test_less_than_asked_for_says_so() -> None:
    runner = runner_of(2)
    with runner.trace(ticks=50) as timeline:
        runner.fit(batches(12, last=None))
    assert timeline.ticks < 50
    assert f"{timeline.ticks} of 50 ticks: fit ended" in str(timeline)
    assert "2 of these ticks are fill or drain" in str(timeline)
    assert repr(timeline) == f"<Timeline of fdg, 2 stages, {timeline.ticks} ticks>"


def test_all_that_was_asked_for_says_nothing_more() -> None:
    runner = runner_of(2)
    with runner.trace(ticks=5) as timeline:
        runner.fit(batches(20, last=None))
    assert timeline.note == ""
    assert timeline.partial_ticks == 0
    assert len(str(timeline).splitlines()) == 3 + 2
