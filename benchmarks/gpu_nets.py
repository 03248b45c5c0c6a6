"""Whole training steps on one card: BP against ``fdg`` in K stages that share it."""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.device_clock import Deadline
from benchmarks.gpu_rounds import Effort, Make, Ratio, take_turns
from benchmarks.gpu_trials import BpTrial, FdgTrial, Task

STAGES = (2, 3, 4)
HOST_GOAL_US = 15.0  # per tick and stage
GOALS = {
    ("resnet56", "float32", "fdg K=4 graphs", "bp eager"): 0.25,
    ("resnet56", "float32", "fdg K=4 graphs", "bp one graph"): 0.7,
}
TRACED_TICKS = 10


def measure_net(
    task: Task, kinds: tuple[str, ...], effort: Effort, deadline: Deadline
) -> dict[str, Any]:
    """``kinds``: of ``bp eager``, ``bp one graph``, ``bp compiled``, ``fdg graphs``, ``fdg eager``,
    in the order in which they are made."""
    task.set_precision()
    makers: dict[str, Make] = {}
    for kind in kinds:
        method, way = kind.split(" ", 1)
        if method == "bp":
            makers[kind] = partial(BpTrial, task, way)
            continue
        for stages in sorted(STAGES, reverse=True):
            make = partial(FdgTrial, task, stages, graphs=way == "graphs")
            makers[f"fdg K={stages} {way}"] = make
    result = take_turns(makers, ratios(task, list(makers)), effort, deadline, task)
    return {"net": task.net, "precision": task.precision, "batch_size": task.batch_size, **result}


def ratios(task: Task, names: list[str]) -> list[Ratio]:
    others = [name for name in names if name.startswith("bp")]
    return [
        Ratio(name, other, GOALS.get((task.net, task.precision, name, other)))
        for name in names
        for other in others
        if name != other
    ]


def host_goals(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """How long the host takes to enqueue a stage's tick, against the goal."""
    found = []
    for case, measured in result["cases"].items():
        host = measured.get("host_us_per_tick")
        if host and case.endswith("graphs"):
            found.append(
                {
                    "name": f"{name}: {case}, host per tick and stage, µs",
                    "measured": host["submit_per_stage"]["median"],
                    "goal": HOST_GOAL_US,
                    "sense": "at most",
                    "met": host["submit_per_stage"]["median"] <= HOST_GOAL_US,
                }
            )
    return found


def trace_net(task: Task, stages: int, folder: Path) -> dict[str, Any]:
    """Some ticks as ``timeline.json`` and ``timeline.png``."""
    task.set_precision()
    trial = FdgTrial(task, stages, graphs=task.device.type == "cuda")
    trial.close()  # its runner is wanted, not its turns
    runner = trial.runner
    batches = list(islice(cycle(task.batches()), 2 * trial.filled + TRACED_TICKS))
    trace = runner.trace(folder / "timeline.json", ticks=TRACED_TICKS, skip=trial.filled)
    with trace as timeline:
        runner.fit(batches)
    return {
        "net": task.net,
        "precision": task.precision,
        "stages": stages,
        "ticks": timeline.ticks,
        "bubble": timeline.bubble,
        "busy": [stage.busy for stage in timeline.stages],
        "seconds_at_work": [dict(stage.work) for stage in timeline.stages],
        "split": runner.split,
    }
