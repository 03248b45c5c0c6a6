"""Where a chain is cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from chains import batches, mlp
from torch import nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner, layer_times, plan, update_time
from fdg_cuda.costs import LayerCost, measure

COSTS = [LayerCost(1.0, 2.0)] * 4


class Slow(nn.Module):
    """Much costlier than a small linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        big = torch.ones(300, 300, dtype=x.dtype)
        for _ in range(20):
            big = big @ big / 300
        return x * big[0, 0]


@pytest.mark.parametrize("position", [1, 5])
def test_the_measured_cut_follows_the_work(position: int) -> None:
    layers: list[nn.Module] = [
        nn.Linear(6, 6),
        *(nn.Linear(6, 6) for _ in range(5)),
        nn.Linear(6, 4),
    ]
    layers[position] = Slow()
    runner = FDGRunner(nn.Sequential(*layers).double(), ["cpu", "cpu", "cpu"])
    runner.fit(batches(2))
    assert runner.split is not None
    bounds = [0, *runner.split, 7]
    stage_of_slow = next(range(a, b) for a, b in itertools.pairwise(bounds) if a <= position < b)
    assert len(stage_of_slow) == 1, runner.split


def test_peeking_at_the_first_batch_takes_none_from_training() -> None:
    runner = FDGRunner(mlp(), ["cpu", "cpu"])
    history = runner.fit(iter(batches(5)))
    assert len(history.batch_losses) == 5


def test_times_are_kept_in_a_file_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    layers, batch = list(mlp(layers=4)), batches(1)[0]

    def forget() -> None:
        monkeypatch.setattr(layer_times, "_known", {})

    def unexpected() -> list[LayerCost]:
        raise AssertionError("measured again")

    known = [LayerCost(n / 3, n / 7, *range(n, n + 8)) for n in range(4)]
    forget()
    assert layer_times.remembered(layers, batch, F.cross_entropy, 1, lambda: known) == known
    forget()
    assert layer_times.remembered(layers, batch, F.cross_entropy, 1, unexpected) == known
    assert layer_times.remembered(layers, batch, F.cross_entropy, 2, lambda: COSTS) == COSTS
    assert len(json.loads((tmp_path / "layer_times.json").read_text())) == 2


@pytest.mark.parametrize("kept", [[0.1, 0.2, 0.3, 0.4], {"forward": [0.1] * 4}, None])
def test_what_an_earlier_version_kept_is_measured_anew(
    kept: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    layers, batch = list(mlp(layers=4)), batches(1)[0]
    file = tmp_path / "layer_times.json"
    for _ in range(2):
        monkeypatch.setattr(layer_times, "_known", {})
        assert layer_times.remembered(layers, batch, F.cross_entropy, 1, lambda: COSTS) == COSTS
        (key,) = json.loads(file.read_text())
        file.write_text(json.dumps({key: kept}))
    assert caplog.text == ""


def test_a_broken_or_forbidden_file_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(layer_times, "_known", {})
    (tmp_path / "layer_times.json").write_text("no json")
    layers, batch = list(mlp(layers=4)), batches(1)[0]
    assert layer_times.remembered(layers, batch, F.cross_entropy, 1, lambda: COSTS) == COSTS
    assert "cannot be read" in caplog.text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "file"))
    assert layer_times.remembered(layers, batch, F.cross_entropy, 3, lambda: COSTS) == COSTS
    assert "cannot be kept" in caplog.text


def test_costs_are_remembered_for_each_mode_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", "")
    monkeypatch.setattr(layer_times, "_known", {})
    layers, batch = [nn.Linear(6, 4), nn.Dropout()], batches(1)[0]
    losses = [F.cross_entropy, F.multi_margin_loss, nn.CrossEntropyLoss()]
    for dropping in (True, False):
        layers[1].train(dropping)
        for number, loss in enumerate(losses):
            costs = [LayerCost(number, dropping)] * 2
            assert layer_times.remembered(layers, batch, loss, 1, lambda c=costs: c) == costs


def test_the_update_is_remembered_and_moves_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with many weights is updated for longer than it computes."""
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    layers = [LayerCost(1.0, 2.0)] * 3 + [LayerCost(1.0, 2.0, parameter_bytes=100)]
    monkeypatch.setattr("fdg_cuda.machine.remembered", lambda *_, **__: layers)
    measured = []

    def measure(threads: int) -> float:
        measured.append(threads)
        return 9.0 / 100 * 4 * update_time.ELEMENTS

    monkeypatch.setattr(update_time, "_on_cpu", measure)
    for _ in range(2):
        monkeypatch.setattr(layer_times, "_known", {})
        runner = FDGRunner(mlp(layers=4), ["cpu"] * 2, cpu_threads=2)
        runner.fit(batches(2))
        assert runner.split == [3]
    assert measured == [1]


def tied() -> list[nn.Module]:
    """Two users of one layer; the costs of all that is between them are the same."""
    shared = nn.Linear(6, 6)
    return [nn.Linear(6, 6), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 4)]


def test_a_measured_cut_keeps_users_of_one_parameter_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fdg_cuda.machine.remembered", lambda *_, **__: [LayerCost(1.0, 2.0)] * 6)
    data = [(x.float(), y) for x, y in batches(2, last=None)]
    runner = FDGRunner(tied(), ["cpu"] * 2)
    runner.fit(data)
    assert runner.split == [4]
    runner = FDGRunner(tied(), ["cpu"] * 5)
    with pytest.raises(ValueError, match=r"\[1, 4, 5\].*at most 4 devices"):
        runner.fit(data)
    planned = plan(tied(), data[0][0], ["cpu"] * 6, target=data[0][1], backward_weights="stash")
    splits = [row.choice.split for row in planned.rows if row.choice is not None]
    assert splits == [(), (4,), (1, 4), (1, 4, 5)]


def test_what_layers_share_is_counted_once() -> None:
    x, y = batches(1)[0]
    first, shared, _, again, *_ = measure(tied(), (x.float(), y), F.cross_entropy, threads=1)
    assert shared.parameter_bytes == first.parameter_bytes > 0 == again.parameter_bytes


def test_no_folder_means_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", "")
    assert layer_times.cache_file() is None
    monkeypatch.delenv("FDG_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert layer_times.cache_file() == Path("/somewhere/fdg_cuda/layer_times.json")
