"""Where a library's calls lead, and leading them elsewhere: in programs and libraries as they are linked
in this world (``csrc/cpu/import_slot.h``)."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from compiling import FLAGS, call_compiler

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() not in ("x86_64", "aarch64"),
    reason="written for glibc on x86-64 and 64-bit ARM",
)

USER = """
#include <cstdlib>
#include <vector>
// Both called and handed on: a library has one slot for calls and one for the address.
extern "C" void* made() { return std::malloc(100); }
extern "C" void call(void* block) { std::free(block); }
extern "C" void (*volatile handed_on)(void*) = nullptr;
extern "C" void hand_on(void* block) { handed_on = std::free; handed_on(block); }
"""

PROGRAM = """
#include <dlfcn.h>
#include <cstdio>
#include <cstdlib>
#include "cpu/import_slot.h"

namespace {
int count = 0;
void counted(void* block) {
  ++count;
  std::free(block);
}
}  // namespace

int main(int, char** arguments) {
  void (*volatile own)(void*) = std::free;  // in code: some programs lend an entry of their own
  own(std::malloc(1));
  void* libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
  void* library = dlopen(arguments[1], RTLD_LAZY);
  if (libc == nullptr || library == nullptr) return std::puts(dlerror()), 1;
  const auto made = reinterpret_cast<void* (*)()>(dlsym(library, "made"));
  const auto call = reinterpret_cast<void (*)(void*)>(dlsym(library, "call"));
  const auto hand_on = reinterpret_cast<void (*)(void*)>(dlsym(library, "hand_on"));
  if (arguments[2] != nullptr) call(made());  // its slot is filled then
  void* function = dlsym(libc, "free");
  const bool lent = dlsym(RTLD_DEFAULT, "free") != function;
  const bool leads = fdg::cpu::calls_lead_to("free", function);
  const bool led = fdg::cpu::redirect_imports(
      "libuser.so", {{"free", function, reinterpret_cast<void*>(&counted)}});
  call(made());
  hand_on(made());
  std::printf("lent %d, leads there %d, led %d, calls %d\\n", lent, leads, led, count);
}
"""

PRELOADED = """
extern "C" void __libc_free(void*);
extern "C" void free(void* block) { __libc_free(block); }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots")


def library_of(folder: Path, name: str, code: str, *options: str) -> Path:
    place = folder / "_".join((name, *options)).replace(",", "_")
    place.mkdir(exist_ok=True)
    source, library = place / f"{name}.cpp", place / f"lib{name}.so"
    source.write_text(code)
    call_compiler("-O1", "-shared", "-fPIC", *options, source, "-o", library)
    return library


def program_of(folder: Path, *options: str) -> Path:
    program = folder / "_".join(("program", *options)).replace(",", "_")
    source = program.with_suffix(".cpp")
    source.write_text(PROGRAM)
    slots = ROOT / "csrc" / "cpu" / "import_slot.cpp"
    call_compiler(*FLAGS, f"-I{ROOT / 'csrc'}", *options, source, slots, "-ldl", "-o", program)
    return program


def output_of(program: Path, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [program, *map(str, arguments)],
        env={**{k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("when", ["at the first call", "when it is loaded"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("options", "lent"),
    [(("-fPIE", "-pie"), 0), (("-fno-PIE", "-no-pie"), 1)],
    ids=["position independent", "at a fixed address, as Debian's Python"],
)
def test_calls_of_a_library_are_led_elsewhere(
    folder: Path, options: tuple[str, ...], lent: int, called: bool, when: str
) -> None:
    """Its slots may be filled already or not, and be read-only behind that."""
    binding = "-Wl,-z,lazy" if when == "at the first call" else "-Wl,-z,relro,-z,now"
    library = library_of(folder, "user", USER, binding)
    program = program_of(folder, *options)
    arguments = [library, "called"] if called else [library]
    assert output_of(program, *arguments) == f"lent {lent}, leads there 1, led 1, calls 2\n"


@pytest.mark.parametrize("options", [("-fPIE", "-pie"), ("-fno-PIE", "-no-pie")])
def test_where_somebody_came_before_nothing_is_led(folder: Path, options: tuple[str, ...]) -> None:
    library = library_of(folder, "user", USER)
    preloaded = library_of(folder, "own", PRELOADED)
    program = program_of(folder, *options)
    assert output_of(program, library, LD_PRELOAD=str(preloaded)) == (
        "lent 1, leads there 0, led 0, calls 0\n"
    )
