"""Versions beside the machine in pytest-benchmark's JSON."""

from __future__ import annotations

from typing import Any

import torch

import fdg_cuda


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["fdg_cuda"] = fdg_cuda.__version__
