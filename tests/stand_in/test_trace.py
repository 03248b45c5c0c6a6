"""``runner.trace`` on CUDA devices: every action on its own lane, by events of the device."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from chains import batches, even_split, mlp, same_bits

from fdg_cuda import FDGRunner


def make_runner(*, staged: bool = False) -> FDGRunner:
    runner = FDGRunner(mlp(), [0, 1, 1], split=even_split(8, 3), lr=0.05)
    runner._machine.stage_every_hop = staged  # type: ignore[attr-defined]
    return runner


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_every_action_of_the_window_is_on_its_lane(tmp_path: Path, staged: bool) -> None:
    runner = make_runner(staged=staged)
    ticks = 6
    with runner.trace(tmp_path / "trace.json", ticks=ticks, skip=8) as timeline:
        runner.fit(batches(20, last=None))
    lanes = Counter((timeline.lanes[s.stream].name, s.code) for s in timeline.spans)
    both = {"stage 0": "UBF", "stage 1": "UBF", "stage 2": "UBF"}
    expected = {(lane, code) for lane, codes in both.items() for code in codes}
    expected |= {("stage 0 send", "A"), ("stage 1 send", "A"), ("stage 1 send", "E")}
    expected |= {("stage 2 send", "E"), ("stage 2 send", "M")}
    expected |= {("stage 0 receive", "I"), ("stage 2 receive", "L")}
    if staged:
        expected |= {("stage 1 receive", "RA"), ("stage 2 receive", "RA")}
        expected |= {("stage 0 receive", "RE"), ("stage 1 receive", "RE")}
    assert lanes == Counter(dict.fromkeys(expected, ticks))
    for stage in timeline.stages:
        assert 0 < stage.busy <= 1
    assert 0 <= timeline.bubble < 1
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "trace.png").stat().st_size > 10_000


def test_training_does_not_notice() -> None:
    plain, traced = make_runner(), make_runner()
    plain.fit(batches(9))
    with traced.trace(ticks=4):
        traced.fit(batches(9))
    assert same_bits(plain.state_dict(), traced.state_dict())


def test_busy_shares_are_not_known() -> None:
    """None, not zeros: only the spans of a trace are measured on a device."""
    runner = make_runner()
    seen = []
    history = runner.fit(batches(9), on_batch=lambda _: seen.append(runner.shares))
    assert [epoch.busy for epoch in history.epochs] == [None]
    assert len(seen) == 9
    assert {None if shares is None else shares.busy for shares in seen} == {None}
    assert str(seen[-1]).startswith("busy -")
