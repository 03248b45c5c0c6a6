"""``pytest benchmarks --quick`` as a whole, and what its parts are."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from benchmarks import bench_fused_update, bench_stage
from benchmarks.alone import run_alone
from benchmarks.bench_fused_update import Case, Sides
from benchmarks.harness import RESULTS
from benchmarks.reports import markdown, micro
from benchmarks.reports.micro_pictures import of_kind
from fdg_cuda._core import keeps_blocks

FOLDER = Path(bench_stage.__file__).parent
NET = bench_stage.QUICK[0]
ALONE = ["--quick", "-q", "-p", "no:cacheprovider", "-o", "timeout=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    file = tmp_path_factory.mktemp("micro") / "micro.json"
    code = pytest.main([str(FOLDER), "--benchmark-json", str(file), *ALONE])
    torch.set_num_threads(threads)
    assert code == pytest.ExitCode.OK
    return file.parent


@pytest.fixture
def results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(markdown, "RESULTS", folder)
    measured: dict[str, Any] = json.loads((folder / "micro.json").read_text())
    return measured


def test_every_table_has_its_rows(results: dict[str, Any]) -> None:
    text = "\n".join(micro.section())
    assert markdown.NOT_MEASURED not in text
    (split,) = (case["split"] for case in of_kind(results, "stage"))
    assert f"| mlp, batch 2, 1 thread, cut at {split} | 2 | 0 |" in text
    assert "| 4 | " in text
    assert "| 1 k, many small tensors, 1 thread | " in text
    assert "| a copy of 4.1 kB | " in text
    assert "threads, beside an idle team | " in text
    assert ("threads: the runner's cache keeps it | " in text) is keeps_blocks()
    assert "hop on the CPU, by reference" in "\n".join(micro.summary())


def test_a_hops_rate_is_that_of_its_time(results: dict[str, Any]) -> None:
    hop = of_kind(results, "hop")[-1]
    rate = hop["bytes"] / (1e-6 * hop["hop_us"]["median"])
    assert 1e9 * hop["gb_per_s"]["median"] == pytest.approx(rate, rel=1e-6)


@pytest.mark.usefixtures("one_torch_thread")
def test_the_update_beside_others_and_the_fastest_way_to_move_memory() -> None:
    with ThreadPoolExecutor(1) as pool:
        sides = Sides(Case(1000, "few", 1, most_repeats=1), 2000, pool)
        sides.round()
    assert min(sides.rounds[0].values()) > 0
    times = {"ours": 2e-6, "plain": 8e-6, "foreach": 6e-6, "fused": 1e-6}
    sides.rounds.append({**times, "scale": 4e-6, "add": 2e-6, "copy": 1e-6})
    found = sides.results(1)
    assert found["ms"]["median"] == pytest.approx(2e-3)
    ratios = {kind: q["median"] for kind, q in found["speed_ratio"].items()}
    assert ratios == pytest.approx({"plain": 4, "foreach": 3, "fused": 0.5})
    rates = {name: q["median"] for name, q in found["gb_per_s"].items()}
    assert rates == pytest.approx({"ours": 10, "scale": 4, "add": 12, "copy": 16})
    assert found["bandwidth_share"]["median"] == pytest.approx(10 / 16)


def test_a_stages_row_adds_up_what_it_does_for_a_batch() -> None:
    seconds = {"F": 0.25, "B": 0.5, "U": 0.125, "A": 1.0}
    spans: list[Any] = [
        SimpleNamespace(code=code, batch=batch, begin_s=10.0, end_s=10.0 + (1 + batch) * long)
        for batch in range(3)
        for code, long in seconds.items()
    ]
    row = bench_stage.stage_row(0, spans, 7)
    assert row["forward_ms"] == {"median": 500.0, "q1": 375.0, "q3": 625.0, "n": 3}
    assert row["up_ms"]["median"] == 2000.0
    assert row["down_ms"] is None
    assert row["samples_per_s"]["median"] == 7 / 1.75


def test_pictures_even_of_nothing(results: dict[str, Any]) -> None:
    for draw in micro.PICTURES.values():
        assert draw(results).axes[0].get_ylabel()
        assert markdown.NOT_MEASURED in draw({"benchmarks": []}).axes[0].texts[0].get_text()


@pytest.mark.usefixtures("one_torch_thread", "no_thread_left")
def test_stages_take_turns_and_do_all_they_do_in_training() -> None:
    stages = 3
    spans = run_alone(NET.make(), [1, 2], NET.batch(), 4, 1)
    spans.sort(key=lambda span: span.begin_s)
    assert all(one.end_s <= other.begin_s for one, other in pairwise(spans))
    for stage in range(stages):
        codes = sorted(span.code for span in spans if span.stage == stage)
        sends = "A" * (stage < stages - 1) + "E" * (stage > 0)
        assert codes == sorted(4 * ("FBU" + sends))


def test_lists_have_the_size_asked_for() -> None:
    for size in bench_fused_update.SIZES:
        assert sum(bench_fused_update.few(size)) == size
        assert sum(bench_fused_update.many(size)) == pytest.approx(size, rel=0.01)
    assert sum(bench_fused_update.many(bench_fused_update.RESNET56)) == bench_fused_update.RESNET56


def test_a_quick_run_does_not_replace_the_result() -> None:
    file = str(RESULTS / "micro.json")
    arguments = [str(FOLDER), "--collect-only", "--benchmark-json", file, *ALONE]
    assert pytest.main(arguments) == pytest.ExitCode.USAGE_ERROR
