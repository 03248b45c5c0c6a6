"""``benchmarks.compare``: every way trains what it should, and a quick run as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import chains
import pytest
import torch
from torch import Tensor
from way_states import CASE, SPLIT, place, trained, training

from benchmarks import compare, contest, cuts
from benchmarks.compare_cases import Case
from benchmarks.compare_trainers import Running
from benchmarks.compare_ways import OURS, PLAIN, PUBLISHED, WAYS, Turn, turn_of
from benchmarks.cuts import BETWEEN, INSIDE, STAGES, Cuts
from benchmarks.reports import compare as report
from benchmarks.reports import markdown
from benchmarks.steps import HYPER
from benchmarks.threads_per_batch import ThreadsPerBatch
from benchmarks.turns import Answer, Player, PlayerError
from fdg_cuda import reference
from fdg_cuda.cutting import Cut

LENGTH = ["--sittings", "2", "--rounds", "2", "--seconds", "0"]
ABSENT = "ModuleNotFoundError: No module named 'absent'"
IN_TWO_PROCESSES = [name for name, way in WAYS.items() if way.processes > 1]


def assert_close(states: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert states.keys() == expected.keys()
    assert chains.largest_difference(states, expected) < 1e-5


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_threads_per_batch_have_the_numbers_of_current_weights(
    stages: int, one_torch_thread: None
) -> None:
    model, data = chains.mlp(), chains.batches()
    split = chains.even_split(len(model), stages)
    expected, _ = chains.oracle(model, split, data, backward_weights="current", **HYPER)
    stashed, _ = chains.oracle(model, split, data, backward_weights="stash", **HYPER)
    parts = chains.cut(model, split)
    pipeline = ThreadsPerBatch(parts, **HYPER)
    for batch in data:
        pipeline.tick(batch)
    pipeline.drain()
    found = torch.nn.Sequential(*(layer for part in parts for layer in part)).state_dict()
    assert chains.largest_difference(found, expected) < 1e-12
    assert stages == 1 or chains.largest_difference(found, stashed) > 1e-6


def test_a_thread_s_error_is_raised_where_the_tick_was_asked_for() -> None:
    pipeline = ThreadsPerBatch(chains.cut(chains.mlp(), [4]), **HYPER)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pipeline.tick((torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.long)))


def test_delayed_ways_train_as_the_reference(tmp_path: Path, one_torch_thread: None) -> None:
    batch = CASE.batch(channels_last=True)
    for method in ("ddg", "fdg"):
        trainer = Running(place(tmp_path), method=method)
        assert trainer.seconds_per_step(0, 2) > 0
        trained = trainer.steady.batches(0, 2)
        chain = CASE.chain(channels_last=True)
        parts = [chain[a:b] for a, b in pairwise([0, *SPLIT, len(chain)])]
        result = reference.train(parts, [batch] * trained, method=method, **HYPER)
        assert result.losses[-1] < result.losses[0]
        assert_close(trainer.state(), chain.state_dict())


def test_the_runner_is_cut_inside_children_where_that_is_so_much_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_torch_thread: None
) -> None:
    def cuts_if_worth(times: float) -> Cuts:
        monkeypatch.setattr(cuts, "WORTH_CAPTURING", times)
        return cuts.measured_cuts(CASE.chain(channels_last=True), CASE.batch(channels_last=True))

    with monkeypatch.context() as patch:
        first = {"stage_seconds": [1.0], "hop_seconds": [0.0], "memory": []}
        patch.setattr(cuts, "best_cut", lambda *_, allowed, **__: Cut(allowed[:1], **first))
        known = cuts_if_worth(0.0)
        assert (known.split, known.points) == ([1], ["1"])

    between, inside = cuts_if_worth(1e9), cuts_if_worth(0.0)
    assert between.inside == between.points == []
    assert set(between.predicted) == {BETWEEN, INSIDE}
    assert len(between.split) == len(inside.inside) == len(inside.points) == STAGES - 1
    trainer = Running(replace(place(tmp_path), cuts=inside), method="fdg")
    assert trainer.seconds_per_step(0, 1) > 0
    assert trainer.steady.runner.split == inside.inside
    assert trainer.steady.runner.split_points == inside.points
    assert trainer.state().keys() == CASE.chain(channels_last=True).state_dict().keys()


@pytest.mark.parametrize("name", ["bp-2", "torchgpipe-4"])
def test_ways_without_delay_compute_what_bp_does(
    name: str, tmp_path: Path, one_torch_thread: None
) -> None:
    if name.startswith("torchgpipe"):
        pytest.importorskip("torchgpipe", reason="of the extra 'bench'")
    states = trained(["bp-1", name], place(tmp_path))
    assert_close(states[name], states["bp-1"])
    untrained = CASE.chain(channels_last=True).state_dict()
    assert chains.largest_difference(untrained, states["bp-1"]) > 1e-3


def test_ways_in_two_processes_compute_what_bp_does(tmp_path: Path, one_torch_thread: None) -> None:
    player = Player(
        [partial(training, IN_TWO_PROCESSES, place(tmp_path, rank)) for rank in range(STAGES)], 60.0
    )
    player.get_ready()
    (first, seconds), (second, _) = (answer.value for answer in player.turn())
    assert seconds > 0
    player.stop()
    expected = trained(["bp-1"], place(tmp_path))["bp-1"]
    for name in IN_TWO_PROCESSES:
        if name == "ddp":
            assert_close(first[name], expected)
            assert_close(second[name], expected)
        else:
            assert not first[name].keys() & second[name].keys()
            assert_close({**first[name], **second[name]}, expected)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    ways = ["bp-2", "ddp", "gpipe-8", "fdg"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            WAYS, "gpipe-8", replace(WAYS["gpipe-8"], processes=1, hops=False, needs="absent")
        )
        compare.main(["--quick", "--out", str(folder), "--batches", "4", *LENGTH, "--ways", *ways])
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


def test_a_quick_run_measures_every_way_in_every_round(results: dict[str, Any]) -> None:
    (case,) = results["cases"]
    assert case["ways"]["gpipe-8"]["error"] == ABSENT
    for name in ("bp-2", "ddp", "fdg"):
        way = case["ways"][name]
        assert [len(seconds) for seconds in way["seconds_by_sitting"]] == [2, 2]
        for key in ("seconds_per_step", "fdg_ratio", "to_bp_2"):
            assert 0 < way[key]["q1"] <= way[key]["median"] <= way[key]["q3"]
            assert way[key]["n"] == 4
        assert way["peak_bytes"] > way["start_bytes"] > 1e7
        assert way["idle_cpu_share"] < 0.5, name  # of some milliseconds
    assert case["ways"]["fdg"]["fdg_ratio"]["median"] == 1
    assert case["ways"]["bp-2"]["to_bp_2"]["median"] == 1
    assert [goal["name"] for goal in results["goals"]] == ["fastest of all others"]


def test_the_file_is_what_the_documents_show(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert markdown.NOT_MEASURED in report.section()
    assert markdown.NOT_MEASURED in report.summary()
    (tmp_path / "compare.json").write_text(json.dumps(results))
    text = "\n".join(report.section())
    assert "| GPipe, 8 micro-batches | failed |" in text
    assert f"| GPipe, 8 micro-batches | tiny, 4 | `{ABSENT}` |" in text
    assert "| fastest of all others: tiny, 4 |" in text
    assert "| tiny | batch 4, cut at " in text
    assert "| tiny, 4 |" in "\n".join(report.summary())
    report.picture(results).savefig(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_an_interrupted_run_keeps_its_cases(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(case: Case, *_: object) -> dict[str, Any]:
        asked.append(case.batch_size)
        return {**results["cases"][0], "batch_size": case.batch_size}

    monkeypatch.setattr(compare, "measure", measured)
    (tmp_path / "compare.json").write_text(json.dumps(results))
    common = ["--quick", "--resume", "--out", str(tmp_path), "--batches", "4", "8"]
    ways = ["--ways", *results["settings"]["ways"]]
    with pytest.raises(SystemExit):
        compare.main([*common, *ways, *LENGTH, "--rounds", "3"])
    compare.main([*common, *ways, *LENGTH])
    assert asked == [8]
    rows = json.loads((tmp_path / "compare.json").read_text())["cases"]
    assert [row["batch_size"] for row in rows] == [4, 8]


def test_every_sitting_has_new_processes_of_the_ways_that_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[str] = []
    begun: list[str] = []

    class Fake:
        """In place of processes: a step takes as long as this is the how-manieth of its way."""

        def __init__(self, makes: list[Any], limit: float, environment: dict[str, str]) -> None:
            (make,) = makes
            self.name = make.args[1]
            begun.append(self.name)
            alive.append(self.name)
            self.turns = 0

        def get_ready(self) -> None:
            if self.name == "ddp 0":
                alive.remove(self.name)
                raise PlayerError("as it should")

        def turn(self, warm_up: int, steps: int) -> list[Answer]:
            self.turns += 1
            if (self.name, self.turns) == ("published 1", 3):
                alive.remove(self.name)
                raise PlayerError("in the second sitting")
            seconds = float(1 + int(self.name[-1]))
            return [Answer(Turn(seconds, 10), 2.0, 0.5, 100 - self.turns)]

        def stop(self) -> None:
            alive.remove(self.name)

    monkeypatch.setattr(contest, "Player", Fake)
    ways = ["bp-2", "ddp", "published", "fdg"]
    found = contest.Contest(ways, lambda name, sitting: [f"{name} {sitting}"], 1.0)  # type: ignore
    for _ in range(2):
        found.begin_sitting()
        for _ in range(2):
            found.round()
        found.end_sitting()
        assert not alive
    assert begun == [*(f"{way} 0" for way in ways), "bp-2 1", "published 1", "fdg 1"]
    assert found.row("ddp") == {"error": "as it should"}
    assert found.row("published") == {"error": "in the second sitting"}
    row = found.row("fdg")
    assert row["seconds_by_sitting"] == [[1.0, 1.0], [2.0, 2.0]]
    assert row["seconds_per_step"]["median"] == 1.5
    assert (row["peak_bytes"], row["start_bytes"], row["idle_cpu_share"]) == (98, 10, 0.25)
    assert row["to_bp_2"]["q3"] == 1
    assert found._ratio("fdg", "published") is None


@pytest.mark.parametrize(
    ("seconds", "faster"),
    [
        ({True: 2.0, False: 1.0}, False),
        ({True: 1.0, False: 2.0}, True),
        ({False: 1.0}, False),
        ({}, True),
    ],
)
def test_a_layout_that_fails_is_not_the_faster_one(
    seconds: dict[bool, float], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trial:
        """In place of processes. Made for a layout, it fails if that has no seconds."""

        def __init__(self, makes: list[bool], limit: float) -> None:
            (self.layout,) = makes

        def get_ready(self) -> None:
            if self.layout not in seconds:
                raise PlayerError("as it should")

        def turn(self) -> list[Answer]:
            return [Answer(seconds[self.layout], 0.0, 0.0, 0), Answer(0.5, 0.0, 0.0, 0)]

        def stop(self) -> None:
            pass

    monkeypatch.setattr(compare, "Player", Trial)
    trials: Any = {True: [True], False: [False]}
    is_faster, found = compare.faster_layout(trials, 1.0)
    assert is_faster is faster
    assert found == {
        name: seconds.get(layout, "as it should") for layout, name in compare.LAYOUTS.items()
    }


@pytest.mark.parametrize("said", ["0", "-1", "two"])
def test_a_case_has_at_least_one_round(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--sittings", said])
    assert f"a whole number from 1 on, not {said}" in capsys.readouterr().err


def test_every_way_is_as_warm_and_timed_as_long() -> None:
    assert turn_of(0.01) == (30, 50)
    assert turn_of(0.5) == (2, 2)
    assert turn_of(4.0) == (1, 2)


def test_goals_are_missed_where_another_is_faster() -> None:
    fast = {"median": 0.8, "q1": 0.7, "q3": 0.9, "n": 2}
    slow = {"median": 1.25, "q1": 1.2, "q3": 1.3, "n": 2}

    def way(kind: str, seconds: float, ratio: dict[str, float]) -> dict[str, Any]:
        times = {**fast, "median": seconds}
        return {"label": kind, "kind": kind, "seconds_per_step": times, "fdg_ratio": ratio}

    ways = {
        "fdg": way(OURS, 1.2, {**slow, "median": 1.0}),
        "ddg": way(OURS, 0.9, {**slow, "median": 1.33}),
        "bp-2": way(PLAIN, 1.0, slow),
        "ddp": {"label": "ddp", "kind": PLAIN, "error": "ValueError"},
        "published": way(PUBLISHED, 1.5, fast),
    }
    case = {"model": "m", "batch_size": 2, "convolutional": True, "ways": ways}
    found = [(g["other"], g["median"], g["met"]) for g in compare.goals([case])]
    assert found == [(PLAIN, 1.25, False), (OURS, 1.33, False), (PUBLISHED, 0.8, True)]
    ways["ddg"]["fdg_ratio"] = {"median": 1.02, "q1": 0.99, "q3": 1.05, "n": 2}
    _, same, _ = compare.goals([case])
    assert (same["name"], same["met"]) == ("as fast as the same rule", True)
    (only,) = compare.goals([{**case, "convolutional": False}])
    assert only["name"] == "not slower than threads per batch"
