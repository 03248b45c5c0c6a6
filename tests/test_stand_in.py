"""The CUDA backend without a GPU: linked against a stand-in for the CUDA runtime.

The stand-in (``tests/stand_in/cudart.cpp``) checks every call and does what is enqueued on the host;
``tests/stand_in`` holds the tests, which run in a process of their own with that extension.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from compiling import FLAGS, JOBS, call_compiler, cuda_headers
from unavailable import unavailable

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc"
STAND_IN = ROOT / "tests" / "stand_in"
SOURCES = ("*.cpp", "cpu/*.cpp", "trace/*.cpp", "python/*.cpp", "cuda/*.cpp")
RUN_TIMEOUT_S = 400


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, with the stand-in in the place of the CUDA runtime."""
    try:
        import pybind11
    except ImportError:
        unavailable("no pybind11: install the test extra")
    folder = tmp_path_factory.mktemp("stand_in", numbered=True)
    includes = (
        f"-I{CORE}",
        f"-I{STAND_IN}",
        *("-isystem", pybind11.get_include()),
        *("-isystem", sysconfig.get_paths()["include"]),
        *("-isystem", cuda_headers()),
    )

    def compile_one(source: Path) -> Path:
        target = folder / "_".join(source.relative_to(ROOT).with_suffix(".o").parts)
        call_compiler(
            *FLAGS, "-O1", "-fPIC", "-fvisibility=hidden", *includes, "-c", source, "-o", target
        )
        return target

    sources = sorted({*STAND_IN.glob("*.cpp"), *(s for p in SOURCES for s in CORE.glob(p))})
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources))
    extension = folder / "_core.so"
    call_compiler("-shared", "-pthread", *objects, "-o", extension)
    return extension


@pytest.fixture(scope="module")
def runs(
    core: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """By file, those that were selected: as many at a time as there are cores."""
    wanted = [
        item.callspec.params["file"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_on_the_stand_in.__name__
    ]
    pool = ThreadPoolExecutor(JOBS)
    yield {file: pool.submit(run, core, file) for file in wanted}
    pool.shutdown(cancel_futures=True)


def run(core: Path, file: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(STAND_IN / file)],
        env={
            **os.environ,
            "FDG_STAND_IN_CORE": str(core),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",  # parallel regions over tiny tensors only cost time
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", sorted(path.name for path in STAND_IN.glob("test_*.py")))
def test_on_the_stand_in(
    runs: dict[str, Future[subprocess.CompletedProcess[str]]], file: str
) -> None:
    done = runs[file].result()
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert " passed" in done.stdout
