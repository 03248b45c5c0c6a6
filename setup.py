"""Builds the extension ``fdg_cuda._core`` with ninja.

The C++ core includes no torch header and links no torch library, so it builds in isolation, in
parallel, in seconds. Everything else about the package stands in pyproject.toml.

``csrc/cuda`` goes in where nvcc is found: on PATH, in CUDA_HOME or in CUDA_PATH. ``FDG_CUDA=1``
demands it, ``FDG_CUDA=0`` leaves it out; which GPU is visible decides nothing. ``FDG_CUDA_ARCHS``
("80;90") says for which architectures.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
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
CUDA_SOURCES = ["cuda/*.cpp", "cuda/*.cu"]
CUDA_ARCHS = "80;90"
NVCC_FLAGS = [
    *("-std=c++17", "-O3"),
    "-fmad=false",  # as -ffp-contract=off above
    *("-Xcompiler", "-Wall,-Wextra,-fPIC,-fvisibility=hidden"),
    *("-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror"),
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


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its compiler, the folders that one uses, and what to compile for."""

    nvcc: str
    includes: list[str]
    libraries: list[str]
    archs: list[int]

    def compile_flags(self) -> list[str]:
        return [f"-isystem {shlex.quote(folder)}" for folder in self.includes]

    def nvcc_flags(self) -> list[str]:
        """Machine code for every architecture, and PTX for those that come after."""
        targets = [(arch, f"sm_{arch}") for arch in self.archs]
        targets.append((self.archs[-1], f"compute_{self.archs[-1]}"))
        flags = [*NVCC_FLAGS, *(f"-gencode arch=compute_{a},code={code}" for a, code in targets)]
        # Without CXX nvcc knows best which compiler it can use; "ccache g++" it does not take.
        if len(compiler := shlex.split(os.environ.get("CXX", ""))) == 1:
            flags.append(f"-ccbin {shlex.quote(compiler[0])}")
        return flags

    def link_flags(self) -> list[str]:
        # Static, so that the extension also loads where there is neither toolkit nor driver.
        folders = [f"-L{shlex.quote(folder)}" for folder in self.libraries]
        return [*folders, "-lcudart_static", "-ldl", "-lrt"]


def wanted_toolkit() -> Toolkit | None:
    """The toolkit to build with; None builds without CUDA."""
    wish = os.environ.get("FDG_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"FDG_CUDA is '{wish}'; 1 demands CUDA, 0 forbids it, unset goes by nvcc")
    nvcc = None if wish == "0" else find_nvcc()
    if nvcc is None:
        if wish == "1":
            sys.exit(
                "FDG_CUDA=1 demands CUDA, but there is no nvcc in CUDA_HOME/bin, in CUDA_PATH/bin "
                "or on PATH: install the CUDA toolkit, 11.8 or newer, or unset FDG_CUDA"
            )
        return None
    includes, libraries = folders_of(nvcc)
    if not any((Path(folder) / "libcudart_static.a").is_file() for folder in libraries):
        sys.exit(
            f"the CUDA toolkit of {nvcc} has no libcudart_static.a in {', '.join(libraries)}: "
            f"install all of it, or set FDG_CUDA=0 to build without CUDA"
        )
    return Toolkit(nvcc, includes, libraries, wanted_archs(nvcc))


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(str(Path(home) / "bin") for home in homes), os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def folders_of(nvcc: str) -> tuple[list[str], list[str]]:
    """Of headers and of libraries. nvcc says which: what is on PATH may be a script elsewhere."""
    shown = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull)

    def words(name: str) -> list[str]:
        return shlex.split(" ".join(re.findall(rf"^#\$ {name}=(.*)$", shown, re.MULTILINE)))

    includes = [word[2:] for word in words("INCLUDES") if word.startswith("-I")]
    libraries = [word[2:] for word in words("LIBRARIES") if word.startswith("-L")]
    usual = [str(Path(top) / name) for top in words("TOP") for name in ("lib64", "lib")]
    return includes, [*libraries, *usual]


def wanted_archs(nvcc: str) -> list[int]:
    text = os.environ.get("FDG_CUDA_ARCHS") or CUDA_ARCHS
    words = [word.strip() for word in text.split(";")]
    known = sorted(map(int, re.findall(r"\bsm_(\d+)\b", output_of(nvcc, "--list-gpu-code"))))
    if not all(word.isdecimal() and int(word) in known for word in words):
        sys.exit(
            f"FDG_CUDA_ARCHS is '{text}'; expected numbers such as '{CUDA_ARCHS}', out of those that "
            f"{nvcc} compiles for: {', '.join(map(str, known))}"
        )
    return sorted({int(word) for word in words})


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr  # --dryrun prints to the latter
    if done.returncode != 0:
        sys.exit(
            f"'{shlex.join(command)}' failed with exit status {done.returncode}; FDG_CUDA=0 builds "
            f"without CUDA. It said:\n{output}"
        )
    return output


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
        toolkit = wanted_toolkit()
        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            f"libraries = {' '.join(toolkit.link_flags() if toolkit else [])}",
            "rule compile",
            "  command = $cxx $flags $cuda_includes -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared -pthread $in $libraries -o $out",
        ]
        if toolkit:
            lines += [
                f"nvcc = {shlex.quote(toolkit.nvcc)}",
                f"nvcc_flags = {' '.join(toolkit.nvcc_flags())}",
                "rule compile_cuda",
                "  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        objects = []
        for source in (Path(name).resolve() for name in ext.sources):
            needs_toolkit = source.parent.name == "cuda"
            if needs_toolkit and not toolkit:
                continue
            name = "_".join(source.relative_to(ROOT.resolve() / "csrc").parts) + ".o"
            rule = "compile_cuda" if source.suffix == ".cu" else "compile"
            lines.append(f"build {escape(folder / name)}: {rule} {escape(source)}")
            if toolkit and needs_toolkit:
                lines.append(f"  cuda_includes = {' '.join(toolkit.compile_flags())}")
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
                + (" FDG_CUDA=0 builds without CUDA." if toolkit else "")
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
                for pattern in (*SOURCES, *CUDA_SOURCES)
                for path in (ROOT / "csrc").glob(pattern)
            ),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
