"""What every benchmark here shares: where it ran, quartiles, and the JSON it leaves."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fdg_cuda
from fdg_cuda.files import replacing

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    """Machine, versions and command of this run."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fdg_cuda": fdg_cuda.__version__,
        "command": command(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# They say where results lie, or how much of them there was before, and nothing of what was measured.
OF_THIS_CALL = {"--out": 1, "--data-root": 1, "--resume": 0, "--anew": 0}


def command() -> str:
    """The command line that repeats this process's results, with modules by their name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name
    words, given = [], iter(sys.argv[1:])
    for word in given:
        option, equals, _ = word.partition("=")
        if option not in OF_THIS_CALL:
            words.append(word)
        elif OF_THIS_CALL[option] and not equals:
            next(given, None)
    return shlex.join(["python", "-m", name, *words])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, lower and upper quartile and the number of values."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "n": 1}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def write(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """``folder/name.json`` with the results and the environment they were measured in, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    text = json.dumps({"environment": environment(), **results}, indent=1) + "\n"
    with replacing(file) as temporary:
        temporary.write_text(text)
    return file
