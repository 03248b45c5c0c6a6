"""The runtime's parts by themselves: stages, scheduler, fused update, hops."""

from __future__ import annotations

from typing import Any

from benchmarks.reports.goals import Goal
from benchmarks.reports.goals import at_most as goal_at_most
from benchmarks.reports.markdown import NOT_MEASURED, load, spread, table
from benchmarks.reports.micro_pictures import (
    KINDS,
    PICTURES,
    STEPS,
    WORKS,
    Case,
    of_kind,
    parameters,
    threads_of,
)

__all__ = ["COMMAND", "PICTURES", "TITLE", "goals", "section", "summary"]

TITLE = "The runtime's own parts"
COMMAND = "pytest benchmarks --benchmark-json benchmarks/results/micro.json"

TENSORS = {"few": "few large", "many": "many small"}
HANDED = {
    "native": "nothing, by native actions",
    "reference": "a tensor by reference, as stages on the CPU do",
}
MEMORY = {
    "library": "the C library's memory as it comes",
    "set_up": "the C library keeps it (one arena)",
    "cache": "the runner's cache keeps it",
}
MISSED = ", missed"
SUMMARY_STAGES = (2, 8)


def section() -> list[str]:
    """All of it."""
    results = load("micro")
    return [
        *stages(of_kind(results, "stage")),
        *scheduler(of_kind(results, "scheduler")),
        *updates(of_kind(results, "update")),
        *hops(of_kind(results, "hop")),
        *idle_threads(of_kind(results, "idle_threads")),
        *freed_memory(of_kind(results, "freed_memory")),
        *([] if results is None else origin(results)),
    ]


def summary() -> list[str]:
    """For the README: the figures that say most."""
    heading = "**The runtime's own parts** (medians, quartiles in brackets)"
    results = load("micro")
    rows = []
    for case in of_kind(results, "scheduler"):
        if case["stages"] in SUMMARY_STAGES and case["work"] == "python":
            name = f"scheduler, K = {case['stages']}, empty Python actions"
            rows.append([name, f"{cost(case)} µs per stage and tick", at_most(case)])
    for case in of_kind(results, "update"):
        if case["goal"] is not None:
            name = f"fused update, {update_name(case)}, against `fused` of torch"
            ratio = f"{spread(case['speed_ratio']['fused'])} times its speed"
            rows.append([name, ratio, at_least(case)])
    for case in of_kind(results, "hop"):
        if case["how"] == "reference":
            rows.append(["hop on the CPU, by reference", f"{spread(case['hop_us'], 1)} µs", "none"])
    if results is None or not rows:
        return [heading, "", NOT_MEASURED, ""]
    return [heading, "", *table(["case", "measured", "goal"], rows), *origin(results)]


def goals() -> list[Goal]:
    results = load("micro")
    found = []
    for work, name in WORKS.items():
        cases = [case for case in of_kind(results, "scheduler") if case["work"] == work]
        if cases:
            worst = max(cases, key=lambda case: float(case["per_stage_and_tick_us"]["median"]))
            what = f"scheduler, empty {name} actions, K = {worst['stages']}, per stage and tick"
            measured = worst["per_stage_and_tick_us"]["median"]
            found.append(goal_at_most(what, measured, worst["goal"], 1, "µs"))
    for case in of_kind(results, "update"):
        if case["goal"] is not None:
            ratio = case["speed_ratio"]["fused"]["median"]
            what = f"fused update, {update_name(case)}: speed / torch's fused"
            found.append(
                Goal(what, f"at least {case['goal']:g}", f"{ratio:.2f}", ratio >= case["goal"])
            )
    return found or [Goal("scheduler and fused update", "see the benchmarks")]


def told(heading: str, text: str, headings: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return [heading, "", NOT_MEASURED, ""]
    return [heading, "", text, "", *table(headings, rows)]


def stages(cases: list[Case]) -> list[str]:
    """A row per stage."""
    rows = [
        [
            *cut_of(case, row["stage"]),
            *(f"{row[f'{name}_ms']['median']:.2f}" for name in STEPS),
            sent(row["up_ms"], row["up_bytes"]),
            sent(row["down_ms"], row["down_bytes"]),
            spread(row["samples_per_s"], 1),
        ]
        for case in cases
        for row in case["rows"]
    ]
    steps = [f"{name}, ms" for name in STEPS]
    return told(
        "**Stages alone**",
        "The runtime's own stages, cut where it would cut, each with the machine to itself and with its "
        "share of the cores. Medians; samples per second of forward, backward and update with "
        "quartiles. Stages on the CPU hand over by reference: what they send costs no time per byte. "
        "![stages](results/micro_stages.png)",
        ["net", "K", "stage", *steps, "sends up", "sends down", "samples per second"],
        rows,
    )


def cut_of(case: Case, stage: int) -> list[str]:
    """The first cells of a row, which the rows below do not repeat."""
    if stage > 0:
        return ["", "", str(stage)]
    threads = threads_of(case["threads"])
    net = f"{case['model']}, batch {case['batch_size']}, {threads}, cut at {case['split']}"
    return [net, str(case["stages"]), "0"]


def sent(milliseconds: dict[str, float] | None, nbytes: int) -> str:
    if milliseconds is None:
        return ""
    return f"{size(nbytes)} in {1e3 * milliseconds['median']:.0f} µs"


def size(nbytes: float) -> str:
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def scheduler(cases: list[Case]) -> list[str]:
    """A row per K."""
    found = {(case["stages"], case["work"]): case for case in cases}
    works = {work: case["goal"] for case in cases for work in [case["work"]]}
    rows = [
        [
            str(count),
            *(cost(found[count, work]) + missed_most(found[count, work]) for work in works),
        ]
        for count in sorted({case["stages"] for case in cases})
    ]
    return told(
        "**The scheduler alone**",
        "What a stage's part of a tick costs if all its actions are empty; µs, medians with quartiles. "
        "![scheduler](results/micro_scheduler.png)",
        ["K", *(f"{WORKS[w]} actions (goal: at most {goal:g})" for w, goal in works.items())],
        rows,
    )


def updates(cases: list[Case]) -> list[str]:
    """A row per size, list of tensors and number of threads."""
    rows = [
        [
            update_name(case),
            f"{case['ms']['median']:.3g}",
            *(spread(case["speed_ratio"][kind]) for kind in KINDS),
            at_least(case),
            f"{case['gb_per_s']['ours']['median']:.3g}",
            spread(case["bandwidth_share"]),
        ]
        for case in cases
    ]
    against = [f"against {kind}" for kind in KINDS]
    return told(
        "**The fused update**",
        "Our speed in times that of `torch.optim.SGD`, with momentum and weight decay; above 1 ours is "
        "faster. Ratios within a round, medians with quartiles. The memory's bandwidth is that of the "
        "fastest of three simple loops, with as many threads in the same round; what fits into the "
        "caches can be above 1. "
        "![update](results/micro_update.png)",
        ["parameters", "ours, ms", *against, "goal (fused)", "GB/s", "share of the bandwidth"],
        rows,
    )


def update_name(case: Case) -> str:
    """``36.5 M, few large tensors, 2 threads``."""
    tensors = TENSORS[case["tensors"]]
    return f"{parameters(case['elements'])}, {tensors} tensors, {threads_of(case['threads'])}"


def hops(cases: list[Case]) -> list[str]:
    """A row per hop."""
    rows = [
        [
            HANDED.get(case["how"], f"a copy of {size(case['bytes'])}"),
            spread(case["hop_us"], 1),
            "" if case["gb_per_s"] is None else spread(case["gb_per_s"]),
        ]
        for case in cases
    ]
    return told(
        "**A hop between two stages on the CPU**",
        "From a stage's send to its neighbour's use: half of a round trip between two streams that wait "
        "for each other's event. Medians with quartiles, of one process. Where Python is part of it (by "
        "reference) two threads take turns with its lock, and processes differ by more than the "
        "quartiles within one.",
        ["what is handed over", "µs", "GB/s"],
        rows,
    )


def idle_threads(cases: list[Case]) -> list[str]:
    """A row per way."""
    rows = []
    for case in cases:
        widths = "-".join(map(str, case["widths"]))
        net = f"MLP {widths}, batch {case['batch_size']}, {threads_of(case['threads'])}"
        rows += [
            [net, spread(case["ms"]["alone"]), ""],
            [f"{net}, beside an idle team", spread(case["ms"]["beside"]), spread(case["ratio"])],
        ]
    return told(
        "**Idle OpenMP threads**",
        "A step in plain torch, on a thread that is not the main one. The main one does nothing, with "
        "or without sleeping OpenMP threads of its own: why the runner ends those of the thread that "
        "calls `fit`.",
        ["a step", "ms", "times without them"],
        rows,
    )


def freed_memory(cases: list[Case]) -> list[str]:
    """A row per kind of memory."""
    rows = [
        [
            f"{case['model']}, batch {case['batch_size']}, {case['threads']} threads: {said}",
            spread(case["ms"][kind], 1),
            spread(case["ratio"][kind]),
            spread(case["pages"][kind], 0),
            spread(case["sleeps"][kind], 1),
        ]
        for case in cases
        for kind, said in MEMORY.items()
    ]
    return told(
        "**Freed tensors' memory**",
        "Threads that have nothing to do with each other train small nets in plain torch, one intra-op "
        "thread each; processes with different memory take turns, and are started anew after some "
        "rounds. This is why the runner keeps freed memory itself, and not by the C library's settings. "
        "Pages and sleeps are those of the process, per step of a thread; it sleeps where it waits for "
        "Python's lock, for the C library's, or for the system's.",
        ["a step", "ms", "time / with the cache", "pages asked for", "times asleep"],
        rows,
    )


def cost(case: Case) -> str:
    return spread(case["per_stage_and_tick_us"], 1)


def missed_most(case: Case) -> str:
    return MISSED if case["per_stage_and_tick_us"]["median"] > case["goal"] else ""


def at_most(case: Case) -> str:
    return f"at most {case['goal']:g}{missed_most(case)}"


def at_least(case: Case) -> str:
    if case["goal"] is None:
        return "none"
    missed = case["speed_ratio"]["fused"]["median"] < case["goal"]
    return f"at least {case['goal']:g}{MISSED if missed else ''}"


def origin(results: dict[str, Any]) -> list[str]:
    """As :func:`markdown.origin`, of pytest-benchmark's own JSON."""
    machine = results["machine_info"]
    return [
        f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores, torch {machine['torch']}, "
        f"Python {machine['python_version']}, {results['datetime'][:10]}; "
        f"`pytest benchmarks --benchmark-json benchmarks/results/micro.json`",
        "",
    ]
