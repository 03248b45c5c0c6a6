"""One card as K devices: ``fdg`` with a group of multiprocessors per stage, BP on one such group."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.device_clock import Deadline
from benchmarks.gpu_rounds import NO_TIME, Effort, Make, Ratio, take_turns
from benchmarks.gpu_trials import BpTrial, FdgTrial, Task
from benchmarks.green_contexts import Groups, green_groups
from fdg_cuda import layer_times

GOALS = {2: 0.53, 3: 0.36, 4: 0.28}  # of fdg on K groups to BP on one


def measure_green(task: Task, effort: Effort, deadline: Deadline) -> dict[str, Any]:
    """One result per K; a K for which something refuses has the traceback instead."""
    task.set_precision()
    found: dict[str, Any] = {}
    for number, stages in enumerate(GOALS):
        name, share = f"K={stages}", deadline.left / (len(GOALS) - number)
        if share < 1:
            found[name] = {"error": NO_TIME}
            continue
        try:
            with green_groups(stages) as groups, layer_times_anew():
                found[name] = on_groups(task, groups, effort, deadline.within(share))
        except Exception:
            found[name] = {"error": traceback.format_exc(limit=-12)}
    return {
        "net": task.net,
        "precision": task.precision,
        "batch_size": task.batch_size,
        "groups": found,
    }


def on_groups(task: Task, groups: Groups, effort: Effort, deadline: Deadline) -> dict[str, Any]:
    stages = len(groups.sizes)
    fdg = f"fdg K={stages} graphs, a group each"
    makers: dict[str, Make] = {
        "bp eager, one group": partial(BpTrial, task, "eager", groups.streams[0]),
        fdg: partial(FdgTrial, task, stages, graphs=True, streams=groups.streams),
        "bp eager, whole card": partial(BpTrial, task, "eager"),
    }
    ratios = [
        Ratio(fdg, "bp eager, one group", GOALS[stages]),
        Ratio("bp eager, one group", "bp eager, whole card"),
    ]
    result = take_turns(makers, ratios, effort, deadline, task)
    return {**asdict(groups), "streams": len(groups.streams), **result}


@contextmanager
def layer_times_anew() -> Iterator[None]:
    """Times measured on the whole card say nothing about a group."""
    before = os.environ.get("FDG_CACHE_DIR")
    os.environ["FDG_CACHE_DIR"] = ""
    layer_times._known.clear()
    try:
        yield
    finally:
        layer_times._known.clear()
        if before is None:
            del os.environ["FDG_CACHE_DIR"]
        else:
            os.environ["FDG_CACHE_DIR"] = before
