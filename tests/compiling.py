"""Compiles C++ for tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from unavailable import unavailable

FLAGS = ("-std=c++17", "-ffp-contract=off", "-g", "-pthread", "-Wall", "-Wextra", "-Werror")
JOBS = 2


class CompileError(Exception):
    """The tests do not compile; the message is the compiler's."""


def compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("c++", "g++") if shutil.which(name)), None)
    if found is None:
        unavailable("no C++ compiler found: install the package g++, or set CXX")
    return [found]


def call_compiler(*arguments: object) -> None:
    command = [*compiler(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def cuda_headers() -> Path:
    """Where ``cuda_runtime_api.h`` is: in a package that came with torch, or the CUDA toolkit."""
    folders = []
    for package, inside in (("triton", "backends/nvidia/include"), ("nvidia", "cu13/include")):
        spec = find_spec(package)
        folders += [
            Path(place) / inside for place in (spec and spec.submodule_search_locations) or []
        ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        folders.append(Path(nvcc).resolve().parent.parent / "include")
    found = next((place for place in folders if (place / "cuda_runtime_api.h").exists()), None)
    if found is None:
        unavailable("no CUDA headers: they come with torch's CUDA builds, or with the toolkit")
    return found
