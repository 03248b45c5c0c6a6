"""Where a chain is cut for CUDA devices: within their memory, at their speeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import batches, mlp

from fdg_cuda import FDGRunner, layer_times
from fdg_cuda.accelerator import accelerator
from fdg_cuda.costs import LayerCost
from fdg_cuda.cuda_machine import PEER, SAME_DEVICE, STAGED
from fdg_cuda.cutting import CutMemoryError
from fdg_cuda.stage_memory import SPARE

pytestmark = pytest.mark.without_race_detector
MB = 1_000_000
Outcome = list[LayerCost] | Exception


def costs(seconds: float = 3.0) -> list[LayerCost]:
    return [LayerCost(seconds / 3, seconds * 2 / 3, saved_bytes=MB)] * 8


def give_every_device(nbytes: float) -> None:
    accelerator().memory_bytes = int(nbytes / (1 - SPARE))  # type: ignore[attr-defined]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Has measuring come to these results, one after the other; returns how often it did."""

    def prepare(*results: Outcome) -> list[Any]:
        left, made = list(results), []

        def measure(*_: Any, **options: Any) -> list[LayerCost]:
            made.append(options)
            result = left.pop(0)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr("fdg_cuda.cuda_machine.measure", measure)
        return made

    monkeypatch.setenv("FDG_CACHE_DIR", "")
    monkeypatch.setattr(layer_times, "_known", {})
    return prepare


def split_of(devices: list[int]) -> list[int] | None:
    runner = FDGRunner(mlp(), devices)
    runner.fit(batches(2))
    return runner.split


@pytest.fixture
def of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(accelerator()), "name", lambda *_: "stand-in")


@pytest.mark.usefixtures("of_one_kind")
def test_within_the_memory_of_each_device(measurements: Any) -> None:
    made = measurements(costs())
    assert split_of([0, 1]) == [4]
    # Stage 0 holds two batches: 6 MB of activations and 5 MB.
    give_every_device(6.5 * MB)
    assert split_of([0, 1]) == [3]
    give_every_device(11.5 * MB)
    assert split_of([0, 1]) == [4]
    assert split_of([0, 0]) == [3]
    give_every_device(4.5 * MB)
    with pytest.raises(CutMemoryError, match=r"on CUDA device \d would need.*'replay' would fit"):
        split_of([0, 1])
    assert len(made) == 1


def test_devices_of_two_kinds_are_measured_both(measurements: Any) -> None:
    made = measurements(costs(), costs(1.0))
    assert split_of([0, 1]) == [2]
    assert len(made) == 2


def test_a_chain_that_does_not_fit_is_measured_on_the_cpu(
    measurements: Any, caplog: pytest.LogCaptureFixture
) -> None:
    too_large = torch.OutOfMemoryError("too large")
    made = measurements(too_large, costs(), too_large)
    assert split_of([0, 1]) == [4]
    assert "device 0, so its layers are measured on the CPU" in caplog.text
    assert "takes them to be equally fast" in caplog.text
    assert "synchronize" not in made[1]


def test_links() -> None:
    machine = FDGRunner(mlp(), [0, 0, 1])._machine
    assert machine.links() == [SAME_DEVICE, PEER]
    machine.stage_every_hop = True  # type: ignore[attr-defined]
    assert machine.links() == [STAGED, STAGED]
