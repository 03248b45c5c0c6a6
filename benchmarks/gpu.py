"""Everything that one card can show, in one command and under eight minutes.

    python -m benchmarks.gpu --out DIR [--cases resnet56-float32,update] [--minutes 8]

Sections run in the order of ``PLAN``, the goals' first; what there is no time for is listed as such.
``DIR/gpu.json`` is written anew after each of them; one that raises leaves its traceback there, and
the next begins. Where a section has lost the device, or hangs, the rest runs in a new process.
With ``--device cpu`` everything runs on tiny nets, to test the program itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import gpu_update
from benchmarks.device_clock import Deadline, DeviceClock
from benchmarks.gpu_green import measure_green
from benchmarks.gpu_nets import host_goals, measure_net, trace_net
from benchmarks.gpu_report import Report, draw_steps, load, show
from benchmarks.gpu_rounds import NO_TIME, Effort
from benchmarks.gpu_trials import Task

NEEDS_CUDA = "needs a CUDA device"
HANG_S = 60.0  # a section may take so much longer than its budget
AT_THE_END_S = 20.0  # pictures and tables, and what a section takes too long
MAIN = ("bp eager", "bp one graph", "fdg graphs", "fdg eager")
BRIEF = ("bp eager", "bp one graph", "fdg graphs")


@dataclass(frozen=True)
class Run:
    """What sections are given."""

    device: torch.device
    out: Path

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def task(self, net: str, precision: str) -> Task:
        if self.is_cuda:
            return Task(net, precision, self.device)
        return Task("mlp", precision, self.device, batch_size=4, image_size=4)

    @property
    def effort(self) -> Effort:
        return Effort(0.8, (5, 60), 7) if self.is_cuda else Effort(0.0, (2, 2), 2)


Measure = Callable[[Run, Deadline], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """One part of the program.

    Attributes:
        needs_s: seconds under which it is not begun.
        budget_s: seconds that it may take while others wait.
    """

    name: str
    needs_s: float
    budget_s: float
    measure: Measure
    on_cpu: bool = True


def net_section(net: str, precision: str, kinds: tuple[str, ...]) -> Measure:
    def measure(run: Run, deadline: Deadline) -> dict[str, Any]:
        known = kinds if run.is_cuda else ("bp eager", "fdg eager")
        result = measure_net(run.task(net, precision), known, run.effort, deadline)
        return {**result, "goals": host_goals(f"{net} {precision}", result)}

    return measure


def update_section(run: Run, deadline: Deadline) -> dict[str, Any]:
    counts = [36_500_000, 350_000_000] if run.is_cuda else [1_000]
    launches, rounds = (20, 15) if run.is_cuda else (2, 2)
    clock = DeviceClock(run.device)
    result = gpu_update.measure_update(counts, clock, launches, rounds, deadline)
    return {**result, "goals": gpu_update.goals(result)}


def green_section(run: Run, deadline: Deadline) -> dict[str, Any]:
    effort = Effort(0.8, (3, 20), 5)
    return measure_green(run.task("wrn28-10", "float32"), effort, deadline)


def timeline_section(run: Run, deadline: Deadline) -> dict[str, Any]:
    return trace_net(run.task("resnet56", "float32"), 4, run.out)


PLAN = [
    Section("resnet56-float32", 20, 100, net_section("resnet56", "float32", MAIN)),
    Section("wrn28-10-float32", 20, 85, net_section("wrn28-10", "float32", BRIEF)),
    Section("update", 10, 25, update_section),
    Section("green", 20, 100, green_section, on_cpu=False),
    Section("timeline", 10, 20, timeline_section),
    Section(
        "resnet56-compiled",
        105,
        110,
        net_section("resnet56", "float32", ("bp eager", "bp compiled", "fdg graphs")),
        on_cpu=False,
    ),
    Section("resnet56-bfloat16", 20, 40, net_section("resnet56", "bfloat16", BRIEF)),
    Section("wrn28-10-bfloat16", 20, 40, net_section("wrn28-10", "bfloat16", BRIEF)),
    Section("wrn28-10-tf32", 20, 40, net_section("wrn28-10", "tf32", BRIEF)),
    Section("resnet56-tf32", 20, 40, net_section("resnet56", "tf32", BRIEF)),
]


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(arguments)
    console = Console()
    settings.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu"), settings.out
    )
    if run.is_cuda:
        torch.cuda.set_device(run.device)
    report = Report(settings.out, {"device": settings.device, "minutes": settings.minutes})
    deadline = Deadline(60 * settings.minutes - AT_THE_END_S)
    names = settings.cases or [section.name for section in PLAN]
    chosen = [section for section in PLAN if section.name in names]
    for number, section in enumerate(chosen):
        again = partial(start_again, settings, chosen[number + 1 :], deadline)
        one_section(section, run, report, deadline, again, console)
    finish(settings.out, report, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = [section.name for section in PLAN]
    parser.add_argument("--out", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--cases", type=sections, help=f"some of {','.join(known)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    settings = parser.parse_args(arguments)
    if settings.minutes <= 0:
        parser.error(f"--minutes must be above 0; got {settings.minutes:g}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu tries the program out on tiny nets")
    return settings


def sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    known = [section.name for section in PLAN]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no section {name!r}; there are {', '.join(known)}")
    return names


def one_section(
    section: Section,
    run: Run,
    report: Report,
    deadline: Deadline,
    again: Callable[[], None],
    console: Console,
) -> None:
    """Measure ``section``; its result, its error or why it was left out goes into the report.

    ``again`` begins the sections behind it in a new process.
    """
    if not (run.is_cuda or section.on_cpu):
        report.skip(section.name, NEEDS_CUDA)
        return
    if deadline.left < (section.needs_s if run.is_cuda else 0):
        report.skip(section.name, NO_TIME)
        return
    console.print(f"{section.name} ({deadline.left:.0f} s left)")
    begin = time.monotonic()
    within = deadline.within(section.budget_s)
    watchdog = Watchdog(section.name, within.left + HANG_S, report, again)
    try:
        result = section.measure(run, within)
        report.keep(section.name, {**result, "seconds": time.monotonic() - begin})
    except Exception:
        report.fail(section.name, traceback.format_exc())
        console.print(traceback.format_exc(limit=-3), markup=False)
    finally:
        watchdog.stop()
    if run.is_cuda and not alive(run.device):
        again()


class Watchdog:
    """Notes where everything stands when a section does not end, and goes on without it."""

    def __init__(
        self, name: str, seconds: float, report: Report, again: Callable[[], None]
    ) -> None:
        self._name, self._seconds = name, seconds
        self._report, self._again = report, again
        self._timer = threading.Timer(seconds, self._bark)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        self._timer.cancel()

    def _bark(self) -> None:
        stacks = "\n".join(
            f"thread {number}:\n{''.join(traceback.format_stack(frame))}"
            for number, frame in sys._current_frames().items()
        )
        self._report.fail(self._name, f"{stacks}\nit did not end within {self._seconds:.0f} s")
        self._again()


def alive(device: torch.device) -> bool:
    """Whether the device still answers: after some errors it never does in this process."""
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def start_again(settings: argparse.Namespace, rest: Sequence[Section], deadline: Deadline) -> None:
    """The rest of the program in the place of this process, with what is left of its time."""
    sys.stdout.flush()
    minutes = max(deadline.left + AT_THE_END_S, 1.0) / 60
    names = ",".join(section.name for section in rest)
    arguments = ["--out", str(settings.out), "--device", settings.device]
    if names:
        arguments += ["--cases", names, "--minutes", f"{minutes:.3f}"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *arguments])
    finish(settings.out, None, Console())
    os._exit(1)


def finish(out: Path, report: Report | None, console: Console) -> None:
    """Pictures and tables."""
    if report is not None:
        report.write()
    written = load(out)
    try:
        draw_steps(out / "gpu_steps.png", written)
    except Exception:
        console.print(traceback.format_exc(), markup=False)
    show(console, written)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
