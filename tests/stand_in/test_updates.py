"""Updates on the stand-in are those of CPU stages, whatever has a part in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import batches, even_split, largest_difference, mlp
from torch import nn

from fdg_cuda import FDGRunner, StageLog, _core
from fdg_cuda.flat import FlatMemory

TOLERANCE = 1e-10
GROUPS = {"0.*": {"lr": 0.02, "nesterov": True}, "*.bias": {"weight_decay": 0.0, "momentum": 0.0}}


def difference_from_cpu(stages: int, *, graphs: bool = False, **options: Any) -> float:
    """Two epochs; BatchNorm and a partial last batch."""
    results = []
    for device in ("cpu", 0):
        of_device = {} if device == "cpu" else {"graphs": graphs}
        runner = FDGRunner(
            mlp(), [device] * stages, split=even_split(8, stages), **options, **of_device
        )
        runner.fit(batches(9), epochs=2)
        results.append(runner.state_dict())
    return largest_difference(*results)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("stages", [1, 3])
def test_parameter_groups(stages: int, backward_weights: str, graphs: bool) -> None:
    difference = difference_from_cpu(
        stages, graphs=graphs, param_groups=GROUPS, backward_weights=backward_weights, lr=0.05
    )
    assert difference < TOLERANCE


@pytest.mark.without_race_detector  # what it sees are the pipelines' streams
@pytest.mark.parametrize("gain", [1.0, 0.25, float("nan")])
def test_the_gain(gain: float) -> None:
    """Two groups, a missing gradient, several chunks; on CUDA the device's memory holds the gain."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n)) for n in (7, 5000, 3)]
    gradients = [torch.randn(7), torch.randn(5000), None]
    hyper = np.array([[[0.1, 0.9, 0.01, 0.0, 0.5], [0.2, 0.0, 0.0, 0.0, 0.25]]])
    results = []
    for device in ("cpu", "cuda"):
        memory = FlatMemory(parameters, 2, 0)
        memory.momentum.fill_(0.125)
        factor = torch.tensor(gain, dtype=torch.float64)
        memory.gradient_table[0] = [0 if g is None else g.data_ptr() for g in gradients]
        if device == "cpu":
            memory.cpu_sgd(hyper, 1, groups=[0, 1, 0], gain=factor).run_update(0, 1, 0)
        else:
            sgd = _core.CudaSgd(
                **memory.addresses(hyper, groups=[0, 1, 0], gain=factor),
                gradient_dtype="float32",
                device=0,
                slots=1,
                ticks_in_flight=1,
            )
            scheduler = _core.Scheduler("cuda", ["update"], devices=[0])
            sgd.run_update(source=0, target=1, slot=0, batch=0, stream=scheduler.stream_handle(0))
            scheduler.synchronize()
            scheduler.close()
        assert (memory.newest, memory.updates) == (1, 1)
        if gain != gain:
            assert torch.equal(memory.weights[0], memory.weights[1])
            assert (memory.momentum == 0.125).all()
        results.append((memory.weights[1], memory.momentum))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clip", [{"clip_norm": 0.3}, {"clip_value": 0.05}], ids=str)
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("stages", [1, 3])
def test_clipping(stages: int, backward_weights: str, clip: dict[str, Any]) -> None:
    difference = difference_from_cpu(
        stages, backward_weights=backward_weights, lr=0.05, beta=0.7, **clip
    )
    assert difference < TOLERANCE


def test_graphs_are_left_out_where_python_needs_the_gradients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="fdg_cuda"):
        runner = FDGRunner(mlp(), [0, 0], split=[4], clip_norm=1.0)
        runner.fit(batches(3))
    said = [record.message for record in caplog.records if "eagerly" in record.message]
    assert len(said) == 1
    assert "clip_norm" in said[0]
    with pytest.raises(ValueError, match=r"graphs=True .* clip_norm"):
        FDGRunner(mlp(), [0, 0], split=[4], clip_norm=1.0, graphs=True)


def adamw(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.3}], ids=str)
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_torch_optimizer(stages: int, backward_weights: str, clip: dict[str, Any]) -> None:
    difference = difference_from_cpu(
        stages, backward_weights=backward_weights, optimizer=adamw, beta=0.7, **clip
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize("options", [{"lr": 0.05, "clip_norm": 0.3}, {"optimizer": adamw}], ids=str)
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize(("stages", "accumulate"), [(1, 2), (3, 2), (3, 3)])
def test_several_batches_per_update(
    stages: int, accumulate: int, backward_weights: str, options: dict[str, Any]
) -> None:
    difference = difference_from_cpu(
        stages, accumulate=accumulate, backward_weights=backward_weights, beta=0.7, **options
    )
    assert difference < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"graphs": True},
        {"graphs": True, "backward_weights": "current"},
        {"graphs": False, "backward_weights": "replay"},
        {"optimizer": adamw, "accumulate": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("stages", [1, 3])
def test_the_log_of_stages(tmp_path: Path, stages: int, options: dict[str, Any]) -> None:
    """Its figures are those of CPU stages, and training is the same, as graphs too."""
    texts, results = [], []
    for device, logged in (("cpu", True), (0, True), (0, False)):
        log = StageLog(tmp_path / f"{device}.csv", every=2)
        rate = {} if "optimizer" in options else {"lr": 0.05}
        of_device = {key: options[key] for key in options if key != "graphs" or device != "cpu"}
        runner = FDGRunner(
            mlp(), [device] * stages, split=even_split(8, stages), **rate, **of_device
        )
        runner.fit(batches(9), epochs=2, callbacks=[log] if logged else [])
        results.append(runner.state_dict())
        texts.append((tmp_path / f"{device}.csv").read_text().splitlines())
    assert largest_difference(results[1], results[2]) == 0
    assert texts[1] == texts[2]
    on_cpu, on_cuda = texts[0], texts[1]
    assert len(on_cpu) == len(on_cuda) > 8 * stages
    for cpu, cuda in zip(on_cpu[1:], on_cuda[1:], strict=True):
        assert cpu.split(",")[:5] == cuda.split(",")[:5]
        figures = [float(value) for value in cpu.split(",")[5:]]
        assert [float(value) for value in cuda.split(",")[5:]] == pytest.approx(figures, rel=1e-9)
