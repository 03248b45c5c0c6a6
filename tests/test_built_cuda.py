"""What was built for GPUs, read from the machine code: no device is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from unavailable import unavailable

from fdg_cuda import _core

EXTENSION = Path(_core.__file__)
ARCHS = (80, 90)
# Weights and gradients, as they stand in the kernels' mangled names.
KERNELS = {
    "float": "sgd_kernelIff",
    "double": "sgd_kernelIdd",
    "float, bfloat16": "sgd_kernelIf13__nv_bfloat16",
    "float, float16": "sgd_kernelIf6__half",
}


@pytest.fixture(scope="module", autouse=True)
def _built_with_cuda() -> None:
    if b".nv_fatbin" in EXTENSION.read_bytes():
        return
    if os.environ.get("FDG_CUDA") == "0":
        pytest.skip("FDG_CUDA=0")
    assert shutil.which("nvcc") is None, "nvcc is here, but the extension was built without CUDA"
    pytest.skip("built without CUDA: no nvcc")


def find_cuobjdump() -> str:
    """The toolkit's, or the one in triton, which comes with torch."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    inside = Path(folders[0]) / "backends/nvidia/bin/cuobjdump" if folders else None
    found = shutil.which("cuobjdump") or (inside and shutil.which(inside))
    return str(found or unavailable("no cuobjdump: install the CUDA toolkit's, or triton"))


@cache
def cuobjdump(*options: str) -> str:
    command = [find_cuobjdump(), *options, str(EXTENSION)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def functions(arch: int, option: str) -> dict[str, str]:
    """What cuobjdump prints about each function of one architecture."""
    printed = cuobjdump(option, "-arch", f"sm_{arch}")
    return dict(re.findall(r"Function *:? (\w+):?\n((?:(?!.*Function).*\n?)*)", printed))


def part_of(parts: dict[str, str], kernel: str) -> str:
    found = [text for name, text in parts.items() if KERNELS[kernel] in name]
    assert len(found) == 1, f"{len(found)} functions named {KERNELS[kernel]} among {list(parts)}"
    return found[0]


def test_there_is_code_for_today_and_ptx_for_later() -> None:
    assert set(re.findall(r"sm_(\d+)\.cubin", cuobjdump("--list-elf"))) >= set(map(str, ARCHS))
    assert f"sm_{max(ARCHS)}.ptx" in cuobjdump("--list-ptx")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_moves_16_bytes_at_a_time(arch: int, kernel: str) -> None:
    code = part_of(functions(arch, "-sass"), kernel)
    loads = len(re.findall(r"\bLDG\.E\.128\b", code))
    stores = len(re.findall(r"\bSTG\.E\.128\b", code))
    # Weights, and of two of the three rules momentum, with aligned and with other gradients.
    assert stores >= 2 * (1 + 2 + 2)
    # Of all that is loaded only gradients are not stored again.
    assert loads >= stores + 3
    # Loads and stores that have to find out which memory they mean.
    assert not re.findall(r"\b(?:LD|ST)\.\S+", code)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_stays_in_registers(arch: int, kernel: str) -> None:
    assert not re.findall(r"\b(?:LDL|STL)\b.*", part_of(functions(arch, "-sass"), kernel))
    usage = part_of(functions(arch, "-res-usage"), kernel)
    assert dict(re.findall(r"\b(STACK|LOCAL):(\d+)", usage)) == {"STACK": "0", "LOCAL": "0"}


def test_the_runtime_is_inside() -> None:
    if shutil.which("readelf") is None:
        unavailable("no readelf: install binutils")
    command = ("readelf", "--dynamic", str(EXTENSION))
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed
    assert not any("cuda" in name for name in needed)
