"""What was built: packed arithmetic in the update, no torch in the core, a header nvcc can share."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from unavailable import unavailable

from fdg_cuda import _core

CSRC = Path(__file__).parent.parent / "csrc"


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code")
@pytest.mark.parametrize(("cpp_type", "kind"), [("f", "ps"), ("d", "pd")], ids=["float", "double"])
def test_the_update_is_vectorised(cpp_type: str, kind: str) -> None:
    if shutil.which("objdump") is None:
        unavailable("no objdump: install binutils")
    code = output_of("objdump", "-d", "--no-show-raw-insn", str(_core.__file__))
    functions = re.findall(rf"<\S*update_avx2I{cpp_type}\S*>:\n((?:.+\n)+)", code)
    assert functions
    body = "".join(functions)
    # Fused multiply-adds of the three rules: without momentum 2, with it 2, Nesterov 3; each in a
    # loop that stores past the cache and in one that does not.
    assert len(re.findall(rf"\bvfn?madd\w+{kind}\s.*%ymm", body)) >= 2 * (2 + 2 + 3)
    assert len(re.findall(r"\bvmovnt(?:dq|p[sd])\s", body)) >= 3, "no stores past the cache"


@pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF")
def test_the_core_does_not_link_torch() -> None:
    if shutil.which("readelf") is None:
        unavailable("no readelf: install binutils")
    dynamic = output_of("readelf", "--dynamic", str(_core.__file__))
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert any("stdc++" in name for name in needed)
    assert not any("torch" in name or "c10" in name for name in needed)


def test_the_update_rule_compiles_for_a_gpu(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    source = tmp_path / "kernel.cu"
    source.write_text(
        """#include "sgd.h"
template <class T>
__global__ void step(T* w, T* v, const T* g, fdg::SgdCoefficients<T> c) {
  w[0] = fdg::sgd_step<true, true>(w[0], g[0], v[0], c);
}
template __global__ void step(float*, float*, const float*, fdg::SgdCoefficients<float>);
template __global__ void step(double*, double*, const double*, fdg::SgdCoefficients<double>);
"""
    )
    ptx = tmp_path / "kernel.ptx"
    output_of(
        *("nvcc", "-std=c++17", "-ptx", "-fmad=false", "-Werror", "all-warnings"),
        *("-I", str(CSRC), str(source), "-o", str(ptx)),
    )
    code = ptx.read_text()
    for item in ("f32", "f64"):
        # Exactly the fma's that are written out: weight decay, Nesterov, step.
        assert len(re.findall(rf"\bfma\.rn\.{item}\b", code)) == 3
