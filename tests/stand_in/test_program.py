"""What a fit asks of the CUDA runtime."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chains import batches, compare, even_split, mlp, same_bits
from torch import nn

from fdg_cuda import FDGRunner, _core
from fdg_cuda.cuda_machine import peers_reach_each_other

BATCHES = 12
COPY = "cudaMemcpyAsync"
PEER_COPY = "cudaMemcpyPeerAsync"


@pytest.fixture(autouse=True)
def ask_peers_again() -> None:
    peers_reach_each_other.cache_clear()


def train(stages: int, devices: list[int], **options: Any) -> FDGRunner:
    runner = FDGRunner(mlp(), devices, split=even_split(8, stages), lr=0.05, **options)
    runner.fit(batches(BATCHES, last=None), epochs=2)
    return runner


def test_every_tick_replays_graphs_and_calls_no_python(stand_in: Any) -> None:
    train(3, [0, 0, 0], graphs=True)
    # A forward and a backward of each stage for every batch of two epochs.
    assert stand_in.calls_of["cudaGraphLaunch"] == 2 * 3 * 2 * BATCHES
    assert stand_in.calls_of["launch_sgd"] == 3 * 2 * BATCHES


def test_tables_are_copied_to_the_device_only_where_they_changed(stand_in: Any) -> None:
    train(1, [0], graphs=True)
    # Per batch: input and labels, each once to the device and once to where the graph reads them,
    # and the metrics back. Hyper-parameters and addresses of gradients: once.
    assert stand_in.calls_of[COPY] == 5 * 2 * BATCHES + 2


def test_what_goes_to_another_device_is_copied_between_peers(stand_in: Any) -> None:
    train(3, [0, 1, 2], graphs=False)
    # Four hops: two up, two down.
    proofs = 4
    assert stand_in.calls_of[PEER_COPY] == 4 * 2 * BATCHES + proofs


@pytest.mark.parametrize("fault", ["unreachable", "corrupt"])
def test_where_peers_do_not_reach_each_other_the_host_is_between(
    stand_in: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA saying no, and CUDA saying yes while what arrives is wrong."""
    caplog.set_level("INFO", logger="fdg_cuda")
    stand_in.peers_reachable = fault != "unreachable"
    stand_in.peers_corrupt = fault == "corrupt"
    difference = compare(
        mlp(),
        even_split(8, 3),
        batches(9),
        device=0,
        prepare=lambda runner: setattr(runner._machine, "_ordinals", [0, 1, 2]),
        lr=0.05,
    )
    assert difference < 1e-10
    # Only the proof is copied between peers.
    assert stand_in.calls_of.get(PEER_COPY, 0) == (0 if fault == "unreachable" else 2)
    assert "0 and 1 cannot reach" in caplog.text


def test_devices_streams_and_graphs_change_no_bit() -> None:
    """Where the stages are and whether they are replayed must not show in the numbers."""
    model = mlp()
    expected = None
    for devices in ([0, 0, 0], [0, 1, 2], [2, 0, 1]):
        for graphs in (False, True):
            runner = FDGRunner(
                copy.deepcopy(model), devices, split=even_split(8, 3), lr=0.05, graphs=graphs
            )
            runner.fit(batches(9), epochs=2)
            weights = runner.state_dict()
            expected = expected or weights
            assert same_bits(weights, expected)


@pytest.mark.parametrize("graphs", [False, True])
def test_stages_compute_on_streams_they_are_given(stand_in: Any, graphs: bool) -> None:
    """Which change no number, and are still there afterwards."""
    peers_reach_each_other(0, 1)  # makes streams too, once
    streams = [_core.stand_in_make_stream(device) for device in (0, 0, 1)]
    runners = []
    for given in ([], streams):
        runner = FDGRunner(mlp(), [0, 0, 1], split=even_split(8, 3), lr=0.05, graphs=graphs)
        runner._machine.compute_streams = given
        made = stand_in.calls_of.get("cudaStreamCreateWithFlags", 0)
        runner.fit(batches(9), epochs=2)
        runner.fit(batches(5))
        runners.append((runner, stand_in.calls_of["cudaStreamCreateWithFlags"] - made))
    (plain, all_made), (adopting, fewer_made) = runners
    assert same_bits(plain.state_dict(), adopting.state_dict())
    assert all_made - fewer_made == 2 * len(streams)
    for stream in streams:
        _core.stand_in_destroy_stream(stream)


def test_metrics_come_back_without_asking_the_device(stand_in: Any) -> None:
    runner = FDGRunner(mlp(), [0, 1], split=[4], lr=0.05)
    history = runner.fit(batches(5))
    evaluated = [b.numel() for b in (torch.tensor(history.batch_losses),)]
    assert evaluated == [5]
    assert history.epochs[0].samples == 4 * 8 + 3
    assert history.epochs[0].accuracy is not None
    assert 0 <= history.epochs[0].accuracy <= 1


def test_a_loss_without_classes_has_no_accuracy() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = [(x, torch.randn(len(x), 2, dtype=torch.float64)) for x, _ in batches(4)]
    runner = FDGRunner(model, [0, 0], split=[1], loss_fn=nn.functional.mse_loss, lr=0.05)
    assert runner.fit(data).epochs[0].accuracy is None


def test_evaluate_and_predict_go_through_the_stages() -> None:
    runner = train(3, [0, 1, 2])
    data = batches(3)
    x = data[0][0]
    plain = mlp()
    plain.load_state_dict(runner.state_dict())
    with torch.no_grad():
        assert torch.equal(runner.predict(x), plain.eval()(x))
    assert runner.evaluate(data).samples == 8 + 8 + 3


def test_fit_under_no_grad_still_trains() -> None:
    """On CUDA devices it runs on the caller's thread, with the caller's settings."""
    with torch.no_grad():
        muted = train(2, [0, 0])
    assert same_bits(muted.state_dict(), train(2, [0, 0]).state_dict())


def test_a_fit_can_follow_a_fit() -> None:
    runner = train(2, [0, 1])
    runner.fit(batches(4))
    runner.fit(batches(4, size=5, last=2))
