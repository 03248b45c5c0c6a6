"""``benchmarks.staleness``: where nothing is stale the angle is 0, elsewhere it is not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import staleness
from benchmarks.reports import markdown
from benchmarks.reports import staleness as report
from benchmarks.staleness import MODES, QUICK, Fresh, angle, angles, cut_evenly, train
from fdg_cuda.models import cifar_resnet
from fdg_cuda.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded")

SAMPLED = [4, 5]


def tiny(stages: int) -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    """A net with BatchNorm, and its batches."""
    parts = cut_evenly(cifar_resnet(8, in_channels=1), stages)[1]
    return parts, [(torch.randn(4, 1, 6, 6), torch.randint(0, 10, (4,))) for _ in range(9)]


def degrees(stages: int, mode: str, lr: float) -> tuple[list[list[float]], list[float]]:
    parts, batches = tiny(stages)
    courses, _ = train(parts, batches, mode, lr)
    return angles(parts, courses, batches, SAMPLED)


def all_zero(found: Sequence[Sequence[float]]) -> bool:
    return all(value == 0 for values in found for value in values)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_stale_where_no_weight_moves_or_there_is_one_stage(mode: str) -> None:
    for stages, lr in ((3, 0.0), (1, 0.1)):
        by_stage, of_net = degrees(stages, mode, lr)
        assert all_zero([*by_stage, of_net])
        assert [len(found) for found in by_stage] == [len(SAMPLED)] * stages


@pytest.mark.parametrize("mode", MODES)
def test_where_gradients_are_stale(mode: str) -> None:
    """At K = 2 the last stage updates one tick behind stage 0's forward with just the weights that
    stage 0 still has; at K = 3 its input is older than that."""
    (first, last), of_net = degrees(2, mode, 0.1)
    assert all_zero([last])
    assert min(first) > 0.1
    assert min(of_net) > 0.1
    by_stage, _ = degrees(3, mode, 0.1)
    assert min(by_stage[2]) > 0.1


def test_modes_differ_where_weights_move_between_forward_and_backward() -> None:
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        found.append(degrees(3, mode, 0.1)[0][0])
    assert found[0] != found[1]


@pytest.mark.parametrize("stages", [2, 5])
def test_the_weights_of_the_moment_are_those_of_the_schedule(stages: int) -> None:
    schedule = Schedule("fdg", stages)
    batch, batches = 9, 30
    parts: list[nn.Module] = [nn.Linear(1, 2)]
    parts += [nn.Linear(2, 2) for _ in range(stages - 1)]
    courses = [staleness.Course() for _ in parts]
    for stage, course in zip(parts, courses, strict=True):
        for updates in range(batches + 1):
            course.weights.append([torch.full_like(p, float(updates)) for p in stage.parameters()])
    fresh = Fresh(parts)
    for k in range(stages):
        fresh.gradients(courses, (torch.ones(2, 1), torch.tensor([0, 1])), batch, k)
        for j, parameters in enumerate(fresh._parameters):
            tick = schedule.backward_tick(k, batch)
            made = sum(schedule.backward_tick(j, other) < tick for other in range(batches))
            assert all(bool((parameter == made).all()) for parameter in parameters)


def test_angles() -> None:
    def parts(*values: float) -> list[Tensor]:
        return [torch.tensor([value]) for value in values]

    assert angle(parts(1, 0), parts(0, 3)) == pytest.approx(90)
    assert angle(parts(1, 0), parts(-2, 0)) == pytest.approx(180)
    assert angle(parts(0.1, 0.7), parts(0.1, 0.7)) == 0
    assert angle(parts(1, 0), parts(1, 1e-9)) == pytest.approx(math.degrees(1e-9))
    for dead in (parts(0, 0), parts(math.nan, 1)):
        assert math.isnan(angle(parts(1, 0), dead))


def test_angles_end_where_training_diverges() -> None:
    parts, batches = tiny(2)
    courses, _ = train(parts, batches, "stash", 0.1)
    courses[1].gradients[SAMPLED[1]][0].fill_(math.inf)
    by_stage, of_net = angles(parts, courses, batches, SAMPLED)
    assert [len(found) for found in (*by_stage, of_net)] == [1, 1, 1]


def test_a_quick_run_and_what_is_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert markdown.NOT_MEASURED in report.section()
    staleness.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "staleness.json").read_text())
    assert [(row["stages"], row["mode"]) for row in results["rows"]] == [
        (stages, mode) for stages in QUICK.stages for mode in MODES
    ]
    assert all(row["sampled"] == QUICK.sampled() for row in results["rows"])
    text = "\n".join(report.section())
    assert "| 3 | `current` | " in text
    assert "mlp on digits, batch 8" in text
    upper, _ = report.picture(results).axes[:2]
    assert len(upper.get_legend_handles_labels()[1]) == len(QUICK.stages)

    lost = {"diverged": 6, "last_losses": None, "sampled": [], "net_degrees": []}
    results["rows"][0] |= {**lost, "stage_degrees": [[], []]}
    (tmp_path / "staleness.json").write_text(json.dumps(results))
    assert "| 2 | `stash` |  |  |  | diverged by batch 6 |" in report.section()
    upper, _, lower, _ = report.picture(results).axes
    assert len(upper.get_legend_handles_labels()[1]) == len(QUICK.stages) - 1
    assert [text.get_text() for text in lower.texts] == ["diverged: K = 2"]


def test_a_run_that_is_interrupted_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = staleness.train
    runs = []

    def interrupted(*arguments: object) -> object:
        runs.append(arguments)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return known(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(staleness, "train", interrupted)
    with pytest.raises(SystemExit, match="130"):
        staleness.main(["--quick", "--jobs", "1", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "staleness.json").read_text())["rows"]) == 1
