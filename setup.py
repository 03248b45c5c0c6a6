"""Builds the extension ``fdg_cuda._core`` with ninja.

The C++ core includes no torch header and links no torch library, so it builds in isolation, in
parallel, in seconds. Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ["*.cpp", "python/*.cpp", "cpu/*.cpp", "trace/*.cpp"]
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    "-ffp-contract=off",  # csrc/sgd.h says where operations are fused
    *("-Wall", "-Wextra", "-Werror"),
]


def ninja_command() -> list[str]:
    """The ninja of the build environment, or the one on PATH."""
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def default_compiler() -> str:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        sys.exit("fdg_cuda needs a C++17 compiler to build: apt install g++, or set CXX")
    return found


class NinjaBuild(build_ext):
    """Writes one build.ninja for the extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or default_compiler()
        flags = [
            *CXX_FLAGS,
            f"-isystem {pybind11.get_include()}",
            f"-isystem {sysconfig.get_paths()['include']}",
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared -pthread $in -o $out",
        ]
        objects = []
        for source in (Path(name).resolve() for name in ext.sources):
            name = "_".join(source.relative_to(ROOT.resolve() / "csrc").with_suffix(".o").parts)
            lines.append(f"build {escape(folder / name)}: compile {escape(source)}")
            objects.append(escape(folder / name))
        lines.append(f"build {escape(output)}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            subprocess.run([*ninja_command(), "-C", str(folder)], check=True)
        except FileNotFoundError:
            sys.exit("fdg_cuda needs ninja to build: pip install ninja")
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"fdg_cuda: compiling the C++ core failed (see above). It needs a C++17 compiler; "
                f"'{compiler}' was used, set CXX to use another. Exit status {error.returncode}."
            )
        if (ROOT / ".git").exists():
            # In a checkout `python -m fdg_cuda` finds the source folder before the installed
            # package; with the extension beside it that works too.
            beside = ROOT.resolve() / "fdg_cuda" / output.name
            if beside != output:
                shutil.copy2(output, beside)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[
        Extension(
            "fdg_cuda._core",
            sorted(
                str(path.relative_to(ROOT))
                for pattern in SOURCES
                for path in (ROOT / "csrc").glob(pattern)
            ),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
