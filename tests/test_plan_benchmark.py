"""The benchmark of plans: that it plans, trains with the planned cut, and keeps real results."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import plan as benchmark
from benchmarks.plan import repeated

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_every_model_is_planned_and_trained(tmp_path: Path) -> None:
    benchmark.main(["--quick", "--rounds", "2", "--ticks", "3", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert [(row["model"], row["stages"], len(row["split"])) for row in rows] == [
        ("mlp", stages, stages - 1) for stages in benchmark.STAGES
    ]
    for row in rows:
        assert row["ratio"]["n"] == 2
        assert row["predicted"]["q1"] > 0
        assert row["real"]["q1"] > 0


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 1), (2.5, 3), (3.0, 3)])
def test_a_turn_lasts_a_while(seconds: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert len(list(repeated(seconds))) == times
