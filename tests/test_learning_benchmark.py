"""``benchmarks.learning`` as a whole on a few digits, and the parts that its figures rest on."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import operator
import re
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks import largest_lr, learning, learning_study
from benchmarks.learning_runs import Way, key_of
from benchmarks.learning_study import Study
from benchmarks.learning_verdicts import T_95, interval, verdicts
from benchmarks.reports import learning as report
from benchmarks.reports import markdown
from benchmarks.side_by_side import side_by_side
from fdg_cuda import data

WAYS = Study().ways
CLASSES = 10


def run(folder: Path, *more: str) -> dict[str, Any]:
    learning.main(["--quick", "--jobs", "1", "--out", str(folder), *more])
    return json.loads((folder / "learning.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    run(folder)
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "learning.json").read_text())


def test_every_way_is_trained_and_the_same_rules_agree(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = read(quick)
    names = [way.name for way in learning.QUICK.ways]
    assert names == ["bp", "fdg K=2 beta=1", "fdg K=2 beta=0.5", "ddg K=2 beta=1"]
    assert list(results["runs"]) == [f"{name} seed=0" for name in names]
    assert list(results["largest_lr"]) == names
    for one in results["runs"].values():
        assert one["split"] == ([] if one["way"] == "bp" else [2])
    monkeypatch.setattr(markdown, "RESULTS", quick)
    text = "\n".join(report.section())
    assert "these runs agree to the last digit" in text
    assert all(f"| `{name}` | " in text for name in names)
    assert "undecided: one seed" in "\n".join(report.summary())


def test_finished_runs_are_kept_and_others_refused(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(quick)
    lost = copy.deepcopy(before)
    del lost["runs"]["fdg K=2 beta=0.5 seed=0"]
    (quick / "learning.json").write_text(json.dumps(lost))
    trained = []
    train = Study.train

    def watched(self: Study, way: Way, *arguments: Any) -> dict[str, Any]:
        trained.append(way.name)
        return train(self, way, *arguments)

    monkeypatch.setattr(Study, "train", watched)
    after = run(quick)
    assert trained == ["fdg K=2 beta=0.5"]
    assert errors_of(after) == errors_of(before)
    said = re.escape(
        f"{quick / 'learning.json'} was made with other settings (lr: 0.1 there, 0.2 now)"
    )
    with pytest.raises(SystemExit, match=said):
        run(quick, "--lr", "0.2")
    assert read(quick) == after
    trained.clear()
    monkeypatch.setattr(Study, "search_lr", lambda *_: after["largest_lr"]["bp"])
    run(quick, "--lr", "0.2", "--anew")
    assert len(trained) == 4
    (quick / "learning.json").write_text(json.dumps(after))


def errors_of(results: dict[str, Any]) -> dict[str, list[float]]:
    return {
        key: [row["test_error"] for row in one["epochs"]] for key, one in results["runs"].items()
    }


def test_what_is_stopped_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Path
) -> None:
    bp = read(quick)["runs"]["bp seed=0"]

    def train(self: Study, way: Way, *_: Any) -> dict[str, Any]:
        if way.stages > 1:
            raise KeyboardInterrupt
        return bp

    monkeypatch.setattr(Study, "train", train)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 130
    assert list(read(tmp_path)["runs"]) == ["bp seed=0"]


def test_pictures_and_reports_of_half_a_study(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = read(quick)
    results["runs"]["fdg K=2 beta=1 seed=0"] |= {"epochs": [], "diverged": "the loss became nan"}
    del results["runs"]["ddg K=2 beta=1 seed=0"], results["largest_lr"]["ddg K=2 beta=1"]
    results["largest_lr"]["bp"]["largest"] = None
    (tmp_path / "learning.json").write_text(json.dumps(results))
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    text = "\n".join(report.section())
    assert "| `fdg K=2 beta=1` | none ended |  | 1 |" in text
    assert "below 0.05" in text
    assert "| 1 diverged |" in "\n".join(report.summary())
    for draw in report.PICTURES.values():
        file = io.BytesIO()
        draw(results).savefig(file, format="png")
        assert file.getvalue().startswith(b"\x89PNG")


def test_a_study_not_done_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert markdown.NOT_MEASURED in report.section()
    assert markdown.NOT_MEASURED in report.summary()


def test_images_are_means_of_four_and_normalised() -> None:
    plain, half = data.load("digits"), learning_study.halved("digits", 100, None)
    first = plain.train.images[0, 0, :2, :2].float().mean()
    assert abs(float(half.train.images[0, 0, 0, 0]) - first) <= 0.5
    assert half.image_size == 4
    x = half.train.batch(torch.arange(100), torch.Generator())[0]
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="1438 training images; got --images 1439"):
        learning_study.halved("digits", 1439, None)


@pytest.mark.parametrize("layers", [5, 8, 11])
def test_even_cuts(layers: int) -> None:
    for stages in (1, 2, 3, 4):
        cuts = [0, *learning_study.even_split(layers, stages), layers]
        sizes = [b - a for a, b in itertools.pairwise(cuts)]
        assert len(sizes) == stages
        assert max(sizes) - min(sizes) <= 1


# -- the largest stable learning rate -------------------------------------------------------------


@pytest.mark.parametrize("edge", range(len(largest_lr.GRID) + 1))
def test_the_edge_is_found_with_few_tries(edge: int) -> None:
    stable = largest_lr.GRID[:edge]
    found = largest_lr.search(lambda lr: [2.3, 1.0] if lr in stable else None, CLASSES)
    assert found["largest"] == (stable[-1] if stable else None)
    assert len(found["probes"]) == 4
    assert all(probe["stable"] == (probe["lr"] in stable) for probe in found["probes"])


def test_stable_means_that_the_end_is_better_than_guessing() -> None:
    guessing = math.log(CLASSES)
    assert largest_lr.judged(1.0, [1e9] * 70 + [0.89 * guessing] * 10, CLASSES)["stable"]
    assert not largest_lr.judged(1.0, [0.1] * 70 + [0.91 * guessing] * 10, CLASSES)["stable"]
    assert not largest_lr.judged(1.0, None, CLASSES)["stable"]


def test_a_rate_that_is_too_large_and_one_that_is_not() -> None:
    study = Study("digits", 256, 8, batch_size=32, probe_updates=48)
    losses = {}

    def tried(losses_with: Any, classes: int) -> dict[str, Any]:
        losses.update({lr: losses_with(lr) for lr in (0.05, 1e6)})
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(largest_lr, "search", tried)
        study.search_lr(Way("fdg", 2))
    assert len(losses[0.05]) == study.probe_updates
    assert largest_lr.judged(0.05, losses[0.05], CLASSES)["stable"]
    assert not largest_lr.judged(1e6, losses[1e6], CLASSES)["stable"]


# -- verdicts -------------------------------------------------------------------------------------


def runs_of(error: Any, seeds: int = 3) -> dict[str, Any]:
    """Runs that end with ``error(way, seed)``; None: diverged."""
    found = {}
    for seed in range(seeds):
        for way in WAYS:
            end = error(way, seed)
            rows = [] if end is None else [{"test_error": end}]
            diverged = "the loss became nan" if end is None else None
            found[key_of(way, seed)] = {
                "way": way.name, "seed": seed, "epochs": rows, "diverged": diverged,
            }  # fmt: skip
    return found


def answers(error: Any, seeds: int = 3) -> list[str]:
    return [verdict.answer for verdict in verdicts(runs_of(error, seeds), WAYS, CLASSES)]


def noise(way: Way, seed: int) -> float:
    return 1e-3 * math.sin(7 * WAYS.index(way) + 5 * seed)


def staleness(way: Way, seed: int) -> float:
    return (way.stages - 1) * (way.method == "fdg") * (way.beta == 1)


def test_the_papers_claims_where_they_hold() -> None:
    said = verdicts(
        runs_of(lambda way, seed: 0.1 + 0.02 * seed + 0.01 * staleness(way, seed)
        - 0.01 * (way == Way("fdg", 2)) + noise(way, seed)), WAYS, CLASSES,
    )  # fmt: skip
    assert [verdict.answer for verdict in said] == ["yes", "yes", "yes", "yes"]
    assert said[0].because.startswith("fdg: +1.")


def test_the_papers_claims_where_they_do_not_hold() -> None:
    assert answers(lambda way, seed: 0.1 - 0.01 * staleness(way, seed) + noise(way, seed)) == [
        "no: it falls", "no: it does harm", "no: better", "yes",
    ]  # fmt: skip
    assert answers(lambda way, seed: 0.1 + noise(way, seed)) == [
        "within noise", "within noise", "yes", "yes",
    ]  # fmt: skip
    assert answers(lambda way, seed: 0.1, seeds=1) == ["undecided: one seed"] * 4


def test_half_a_recovery() -> None:
    stale = {1.0: 0.02, 0.5: 0.01}
    end = answers(lambda way, seed: 0.1 + noise(way, seed)
    + stale[way.beta] * (way.method == "fdg"))  # fmt: skip
    assert end[1] == "partly"
    assert end[2:] == ["no: worse", "no: worse"]


@pytest.mark.parametrize(("gain", "answer"), [(0.005, "partly"), (0.0, "no")])
def test_what_is_small_but_certain_is_no_noise(gain: float, answer: str) -> None:
    def error(way: Way, seed: int) -> float:
        stale = 0.003 if way.stages == 2 else 0.03 * (way.stages - 2)
        shrunk = (-1) ** seed * 0.001 - gain * (way.stages > 2)
        return (
            0.1 + noise(way, seed) / 10 + (way.method == "fdg") * (stale + (way.beta != 1) * shrunk)
        )

    end = answers(error, seeds=8)
    assert end[1] == f"{answer}: less than half of it"
    assert end[2] == "no: worse, by less than 0.5 points"


def test_a_run_that_diverged_counts_as_guessing() -> None:
    worst = Way("fdg", 4, 1.0)
    said = verdicts(
        runs_of(lambda way, seed: None if way == worst else 0.1 + noise(way, seed)), WAYS, CLASSES
    )
    assert said[0].answer == "yes"
    slope = 0.8 * 1.5 / 5  # of 0, 0, 0, 0.8 over 1, 2, 3, 4
    assert float(said[0].because.split()[1]) == pytest.approx(100 * slope, abs=0.1)


def test_seeds_are_compared_with_themselves_only() -> None:
    runs = runs_of(lambda way, seed: 0.1 + noise(way, seed))
    for way in WAYS[1:]:
        del runs[key_of(way, 2)]
    runs[key_of(WAYS[0], 2)]["epochs"][-1]["test_error"] = 0.9
    wide = "within noise, which is wider than 0.5 points"  # of two seeds
    assert [v.answer for v in verdicts(runs, WAYS, CLASSES)][2:] == ["yes", wide]


def test_intervals_are_those_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx([stats.t.ppf(0.975, df) for df in range(1, 11)], abs=5e-4) == list(T_95)
    values = [0.3, -0.1, 0.25, 0.4]
    found, expected = interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(expected.low, rel=1e-3)
    assert found.mean + found.half == pytest.approx(expected.high, rel=1e-3)


# -- processes ------------------------------------------------------------------------------------


def test_work_in_processes_of_its_own() -> None:
    tasks = [partial(operator.mul, 2, number) for number in range(5)]
    for processes in (1, 2):
        with side_by_side(tasks, processes) as finished:
            assert dict(finished) == {number: 2 * number for number in range(5)}
    assert active_children() == []


def test_what_is_at_work_ends_with_the_block() -> None:
    begin = time.monotonic()
    tasks = [partial(operator.neg, 1), *[partial(time.sleep, 60)] * 3]

    def stopped() -> None:
        with side_by_side(tasks, 2) as finished:
            assert next(finished) == (0, -1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert active_children() == []
    assert time.monotonic() - begin < 30


@pytest.mark.skipif(
    not data.DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_a_run_on_fashion_mnist() -> None:
    """The study's own data, as few of them as possible."""
    study = Study(images=256, model_depth=8, epochs=1)
    run = study.train(Way("fdg", 2), 0)
    (row,) = run["epochs"]
    assert run["diverged"] is None
    assert 0 < row["test_error"] < 1
    assert len(learning_study.halved("fashion-mnist", 256, None).test) == 10_000
