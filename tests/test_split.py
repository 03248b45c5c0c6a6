"""Where a chain is cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from chains import batches, mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fdg_cuda import FDGRunner, layer_times
from fdg_cuda.split import balance, check_split, measure


def longest(costs: list[int], cuts: tuple[int, ...] | list[int]) -> int:
    bounds = [0, *cuts, len(costs)]
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


@given(costs=st.lists(st.integers(0, 50), min_size=1, max_size=9), data=st.data())
def test_balance_is_as_good_as_the_best_of_all_cuts(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cuts = balance(costs, stages)
    assert check_split(cuts, len(costs), stages) == cuts
    every = itertools.combinations(range(1, len(costs)), stages - 1)
    assert longest(costs, cuts) == min(longest(costs, other) for other in every)


def test_too_few_layers() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3"):
        balance([1.0, 1.0], 3)


def test_measuring_leaves_no_trace() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(8, 4)
    ]  # fmt: skip
    model = nn.Sequential(*layers).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    seconds = measure(layers, batches(1)[0], nn.functional.cross_entropy, threads=1)
    assert len(seconds) == 5
    assert all(s > 0 for s in seconds)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


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

    def unexpected() -> list[float]:
        raise AssertionError("measured again")

    forget()
    assert layer_times.remembered(layers, batch, 1, lambda: [1.0, 2, 3, 4]) == [1, 2, 3, 4]
    forget()
    assert layer_times.remembered(layers, batch, 1, unexpected) == [1, 2, 3, 4]
    assert layer_times.remembered(layers, batch, 2, lambda: [4.0] * 4) == [4.0] * 4
    assert len(json.loads((tmp_path / "layer_times.json").read_text())) == 2


def test_a_broken_or_forbidden_file_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(layer_times, "_known", {})
    (tmp_path / "layer_times.json").write_text("no json")
    layers, batch = list(mlp(layers=4)), batches(1)[0]
    assert layer_times.remembered(layers, batch, 1, lambda: [1.0] * 4) == [1.0] * 4
    assert "cannot be read" in caplog.text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path / "file"))
    assert layer_times.remembered(layers, batch, 3, lambda: [1.0] * 4) == [1.0] * 4
    assert "cannot be kept" in caplog.text


def test_no_folder_means_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDG_CACHE_DIR", "")
    assert layer_times.cache_file() is None
    monkeypatch.delenv("FDG_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert layer_times.cache_file() == Path("/somewhere/fdg_cuda/layer_times.json")
