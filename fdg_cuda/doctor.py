"""The doctor command: what is installed, which devices can be used, and whether training works."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fdg_cuda import __version__
from fdg_cuda.settings import cores

# In float64 a wrong delay, weight version or factor shows far above this, and the order in which
# the runner and the oracle add far below.
TOLERANCE = 1e-9
CUDA_SELF_TEST = "self-test cuda"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state`` is ``"ok"``, ``"no"`` (something one can do without) or
    ``"FAIL"`` (training is not possible)."""

    state: str
    subject: str
    text: str


def examine(console: Console | None = None) -> bool:
    """Print the report; whether this installation can train."""
    console = console or Console(highlight=False, markup=False)
    findings = list(_findings())
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"ok": "green", "no": "yellow", "FAIL": "bold red"}
    for finding in findings:
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(state, finding.subject, Text(finding.text))
    console.print(table)
    usable = all(finding.state != "FAIL" for finding in findings)
    on_cuda = any(f.state == "ok" and f.subject == CUDA_SELF_TEST for f in findings)
    where = "on CPU and CUDA devices" if on_cuda else "on the CPU"
    console.print(
        f"OK: fdg_cuda can be used {where}" if usable else "fdg_cuda cannot be used as it is"
    )
    return usable


def _findings() -> Iterator[Finding]:
    yield Finding("ok", "fdg_cuda", f"{__version__}, in {Path(__file__).parent}")
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.platform()}")
    yield _package("torch", "FAIL", "training needs it: pip install torch")
    yield _package("torchvision", "no", "fashion-mnist and CIFAR cannot be downloaded")
    yield _package("sklearn", "no", "the digits are inside it: pip install scikit-learn")
    extension = _guarded("extension", _extension)
    yield extension
    if extension.state == "FAIL":
        return
    yield Finding("ok", "cores", f"{cores()}, CPU stages share them")
    try:
        yield from _devices()
    except Exception as error:
        yield Finding("FAIL", "devices", _words(error))
    yield _guarded("self-test", lambda: _self_test("cpu"))
    if _cuda_is_usable():
        yield _guarded(CUDA_SELF_TEST, lambda: _self_test(0))


def _guarded(subject: str, examine: Callable[[], str]) -> Finding:
    # Whatever is wrong belongs in the report, and what follows is still worth knowing.
    try:
        return Finding("ok", subject, examine())
    except Exception as error:
        return Finding("FAIL", subject, _words(error))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _package(module: str, if_missing: str, why: str) -> Finding:
    try:
        version = importlib.import_module(module).__version__
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        return Finding(if_missing, module, f"{why} ({_words(error)})")
    return Finding("ok", module, str(version))


def _extension() -> str:
    try:
        from fdg_cuda import _core
    except ImportError as error:
        raise ImportError(
            f"fdg_cuda was imported from {Path(__file__).parent}, where its extension is not built "
            f"({error}); run `pip install .` there, or leave this folder if fdg_cuda is installed "
            f"elsewhere"
        ) from error
    return f"backends {', '.join(_core.backends)}"


def _devices() -> Iterator[Finding]:
    import torch

    from fdg_cuda import _core
    from fdg_cuda.devices import parse_devices

    parse_devices(["cpu"])
    yield Finding("ok", "device cpu", f"{torch.get_num_threads()} threads by default")
    if not _core.openmp_threads():
        yield Finding("no", "openmp", "torch brings no OpenMP: a stage updates on one thread")
    if not _core.keeps_blocks():
        yield Finding(
            "no",
            "memory",
            "freed tensors cannot be kept here (torch calls another C allocator than glibc's, or in a "
            "way unknown here): CPU stages may be slower by some percent",
        )
    count = torch.cuda.device_count()
    if not count:
        yield Finding("no", "device cuda", _why_no_cuda())
    for ordinal in range(count):
        name = torch.cuda.get_device_name(ordinal)
        try:
            parse_devices([ordinal])
        except (ValueError, RuntimeError) as error:
            yield Finding("no", f"device {ordinal}", f"{name}: {error}")
        else:
            yield Finding("ok", f"device {ordinal}", name)


def _why_no_cuda() -> str:
    import torch

    from fdg_cuda import _core
    from fdg_cuda.devices import NO_CUDA_PART

    reasons = []
    if torch.version.cuda is None:
        reasons.append("this torch was built without CUDA")
    else:
        reasons.append(
            f"torch (CUDA {torch.version.cuda}) sees no device: no NVIDIA driver or none that is "
            f"recent enough, or CUDA_VISIBLE_DEVICES hides them (nvidia-smi tells)"
        )
    if "cuda" not in _core.backends:
        reasons.append(NO_CUDA_PART)
    return "; ".join(reasons)


def _cuda_is_usable() -> bool:
    import torch

    from fdg_cuda import _core

    return torch.cuda.device_count() > 0 and "cuda" in _core.backends


def _self_test(device: str | int) -> str:
    """Train a few batches on two stages on ``device`` and compare with the oracle.

    Raises:
        ArithmeticError: the weights or losses differ.
    """
    import torch
    from torch import nn

    from fdg_cuda import reference
    from fdg_cuda.runner import FDGRunner

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
        ).double()
        batches = [
            (torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(6)
        ]
    expected = copy.deepcopy(model)
    result = reference.train([expected[:3], expected[3:]], batches, epochs=2)
    begin = time.perf_counter()
    history = FDGRunner(model, [device, device], split=[3]).fit(batches, epochs=2)
    seconds = time.perf_counter() - begin
    difference = max(
        float((a.cpu() - b).detach().abs().max())
        for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )
    losses = zip(history.batch_losses, result.losses, strict=True)
    difference = max(difference, *(abs(a - b) for a, b in losses))
    if not difference <= TOLERANCE:
        raise ArithmeticError(
            f"training on two stages on {device} is {difference:.2g} away from the reference (at most "
            f"{TOLERANCE:g} is allowed); rebuild the extension, and report this if it stays"
        )
    return (
        f"OK: {len(result.losses)} batches on {device},{device} in {seconds:.2f} s, within "
        f"{difference:.1g} of the reference"
    )
