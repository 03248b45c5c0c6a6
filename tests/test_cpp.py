"""The C++ core's own tests (``tests/cpp``): plain, and under the thread and address sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiling import FLAGS, JOBS, CompileError, call_compiler, compiler, cuda_headers
from unavailable import unavailable

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc"
TESTS = ROOT / "tests" / "cpp"
# What plays the CUDA runtime and the kernels.
STAND_IN = ROOT / "tests" / "stand_in"
RUNTIME = ("cudart.cpp", "kernels.cpp", "races.cpp")
RUN_TIMEOUT_S = 120  # for one that hangs; a run takes seconds


@dataclass(frozen=True)
class Build:
    """How the tests are compiled: ``core`` optimises the core, the tests themselves are not.

    Optimising what the address sanitizer adds takes longer than running it as it is.
    """

    core: tuple[str, ...]
    sanitizer: tuple[str, ...] = ()
    package: str = ""  # that has the sanitizer's runtime


BUILDS = {
    "plain": Build(("-O2",)),
    "thread": Build(("-O1",), ("-fsanitize=thread",), "libtsan"),
    "address, undefined": Build(
        ("-O0",),
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "libasan and libubsan",
    ),
}


def check_sanitizer(build: Build, folder: Path) -> None:
    if not build.sanitizer:
        return
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        call_compiler(*build.sanitizer, probe, "-o", folder / "probe")
    except CompileError as error:
        unavailable(
            f"{compiler()[0]} cannot link with {' '.join(build.sanitizer)}: install the package "
            f"{build.package} of its version\n{error}"
        )


def compile_tests(build: Build, folder: Path) -> Path:
    """The test program of ``build``, its objects compiled a few at a time."""
    check_sanitizer(build, folder)
    patterns = ("*.cpp", "cpu/*.cpp", "trace/*.cpp", "cuda/*.cpp")
    core = sorted(path for pattern in patterns for path in CORE.glob(pattern))
    sources = [(source, build.core) for source in core if "bindings" not in source.name]
    tests = [
        *TESTS.glob("*.cpp"),
        *TESTS.glob("cuda/*.cpp"),
        *(STAND_IN / name for name in RUNTIME),
    ]
    sources += [(source, ("-O0",)) for source in sorted(tests)]
    includes = (f"-I{CORE}", f"-I{TESTS}", f"-I{STAND_IN}", "-isystem", cuda_headers())

    def compile_one(source: Path, optimisation: tuple[str, ...]) -> Path:
        target = folder / "_".join(source.relative_to(ROOT).with_suffix(".o").parts)
        call_compiler(
            *FLAGS, *optimisation, *build.sanitizer, *includes, "-c", source, "-o", target
        )
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, *zip(*sources, strict=True)))
    program = folder / "tests"
    # The core first: of an inline function that is in several objects the linker takes the first.
    # -rdynamic: the core looks the stand-in for OpenMP up by name.
    call_compiler("-pthread", "-rdynamic", *build.sanitizer, *objects, "-ldl", "-o", program)
    return program


@pytest.fixture(scope="module")
def program_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles the test program of a build when it is first asked for."""
    programs: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in programs:
            folder = tmp_path_factory.mktemp("cpp", numbered=True)
            programs[name] = compile_tests(BUILDS[name], folder)
        return programs[name]

    return get


def run(command: list[str]) -> tuple[int | str, str]:
    """The exit status (or "timeout") and everything the command printed."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as hung:
        return "timeout", (hung.stdout or b"").decode(errors="replace")
    output = done.stdout.decode(errors="replace")
    # Older runtimes of the thread sanitizer cannot start where addresses are very random.
    if "unexpected memory mapping" in output and command[0] != "setarch":
        return run(["setarch", "--addr-no-randomize", *command])
    return done.returncode, output


@pytest.mark.parametrize("build", BUILDS)
def test_core(build: str, program_of: Callable[[str], Path]) -> None:
    status, output = run([str(program_of(build))])
    assert status == 0, f"the C++ tests ended with {status}:\n{output}"
    assert " ok " in output
