"""The scheduler and the fused update by themselves."""

from __future__ import annotations

from benchmarks.reports.goals import Goal, at_most
from benchmarks.reports.markdown import NOT_MEASURED, load, spread, table

COMMAND = "pytest benchmarks --benchmark-json benchmarks/results/micro.json"
SCHEDULER = {"native": 10.0, "Python": 60.0}  # µs per stage and tick, on two cores
UPDATE = {"36.5M": 0.95, "resnet56": 2.0}  # times the speed of torch's fused SGD


def section() -> list[str]:
    results = load("micro")
    heading = "**Scheduler and fused update**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = []
    for benchmark in results["benchmarks"]:
        p, extra = benchmark["params"], benchmark["extra_info"]
        if "per_stage_and_tick_us" in extra:
            kind = "native" if "[native" in benchmark["name"] else "Python"
            name = f"scheduler, K = {p['stages']}, empty {kind} actions"
            rows.append([name, f"{extra['per_stage_and_tick_us']:.1f} µs per stage and tick"])
        if "speed_ratio" in extra:
            threads = f"{p['threads']} thread{'s' * (p['threads'] > 1)}"
            name = f"fused update, {p['parameters']} parameters, {threads}, against {p['other']}"
            rows.append([name, f"{spread(extra['speed_ratio'])} times its speed"])
    machine = results["machine_info"]
    return [
        heading,
        "",
        *table(["case", "measured"], rows),
        f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores, "
        f"Python {machine['python_version']}, torch {machine['torch']}; "
        f"`pytest benchmarks --benchmark-json benchmarks/results/micro.json`",
        "",
    ]


def goals() -> list[Goal]:
    results = load("micro")
    names = {kind: f"scheduler, empty {kind} actions, µs per stage and tick" for kind in SCHEDULER}
    if results is None:
        return [Goal(names[kind], f"at most {limit:g}") for kind, limit in SCHEDULER.items()]
    found: list[Goal] = []
    for kind, limit in SCHEDULER.items():
        mark = "[native" if kind == "native" else "[python"
        cases = {
            b["params"]["stages"]: b["extra_info"]["per_stage_and_tick_us"]
            for b in results["benchmarks"]
            if "per_stage_and_tick_us" in b["extra_info"] and mark in b["name"].lower()
        }
        if cases:
            worst = max(cases, key=lambda stages: float(cases[stages]))
            found.append(at_most(f"{names[kind]}, the most (K = {worst})", cases[worst], limit, 1))
    for benchmark in results["benchmarks"]:
        p, extra = benchmark["params"], benchmark["extra_info"]
        if p.get("other") == "torch fused" and p["parameters"] in UPDATE:
            limit, ratio = UPDATE[p["parameters"]], extra["speed_ratio"]["median"]
            name = f"fused update, {p['parameters']}, threads: {p['threads']}: speed / torch fused"
            found.append(Goal(name, f"at least {limit:g}", f"{ratio:.2f}", ratio >= limit))
    return found
