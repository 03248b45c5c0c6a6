"""``--quick`` of ``pytest benchmarks``, and versions beside the machine in pytest-benchmark's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fdg_cuda
from benchmarks.harness import RESULTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="tiny sizes: only see that the benchmarks work"
    )


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("benchmark_json", None)
    if given is None or not config.getoption("quick"):
        return
    file = given if isinstance(given, Path) else Path(given.name)  # opened, in earlier versions
    if file.resolve().parent == RESULTS.resolve():
        raise pytest.UsageError(
            f"--quick measures nothing worth keeping: name a file outside of {RESULTS.name} with "
            f"--benchmark-json"
        )


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["fdg_cuda"] = fdg_cuda.__version__
