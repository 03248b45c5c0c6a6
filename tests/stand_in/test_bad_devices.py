"""Devices and options that cannot be: refused in words before anything is trained."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from chains import batches, mlp

from fdg_cuda import FDGRunner, _core


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        ([0, "cpu"], {}, "mixes cpu and cuda devices (cuda:0, cpu)"),
        (["cpu", "cuda:1"], {}, "all on CUDA devices or all on the CPU"),
        ([0, 3], {}, "this machine has 3 CUDA devices, numbered from 0 to 2"),
        (["cuda:7"], {}, "device 7 is not there: this machine has 3 CUDA devices"),
        ([0, 0], {"cpu_threads": 2}, "cpu_threads is for stages on the CPU"),
        ([0, 0], {"graphs": "yes"}, "graphs must be 'auto', True or False; got 'yes'"),
        ([0, 0], {"graphs": 2}, "graphs must be 'auto', True or False; got 2"),
        (["cpu", "cpu"], {"graphs": True}, "graphs=True asks for CUDA graphs"),
    ],
)
def test_refused(devices: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FDGRunner(mlp(), devices, **options)


def test_an_installation_without_its_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "backends", ("cpu", "trace"))
    with pytest.raises(
        ValueError, match=r"no CUDA part: it was built with FDG_CUDA=0, or.*FDG_CUDA=1"
    ):
        FDGRunner(mlp(), [0, 0])


def test_a_name_without_a_number_is_the_first_device() -> None:
    assert "cuda:0, cuda:1" in repr(FDGRunner(mlp(), ["cuda", "cuda:1"], split=[4]))


def test_autocast_around_fit() -> None:
    runner = FDGRunner(mlp(), [0, 0], split=[4])
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match=r"torch\.autocast around fit does not reach"),
    ):
        runner.fit(batches(3))


@pytest.mark.parametrize("code", [209, 222])
def test_an_nvcc_that_does_not_know_the_gpu(stand_in: Any, code: int) -> None:
    """cudaErrorNoKernelImageForDevice and cudaErrorUnsupportedPtxVersion."""
    runner = FDGRunner(mlp(), [0, 0], split=[4])
    stand_in.reset()
    stand_in.fail_in, stand_in.fail_at = "launch_sgd", 1
    stand_in.fail_with(code)
    with pytest.raises(
        RuntimeError, match=r"by an nvcc that does not know this GPU.*FDG_CUDA_ARCHS"
    ):
        runner.fit(batches(3))


def test_a_driver_older_than_the_toolkit(stand_in: Any) -> None:
    runner = FDGRunner(mlp(), [0, 0], split=[4])
    stand_in.reset()
    stand_in.fail_in, stand_in.fail_at = "cudaGetDevice", 1
    stand_in.fail_with(35)
    with pytest.raises(RuntimeError, match="driver is older than the CUDA toolkit"):
        runner.fit(batches(3))
