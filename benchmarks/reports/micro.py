"""The scheduler and the fused update by themselves."""

from __future__ import annotations

from benchmarks.reports.markdown import NOT_MEASURED, load, spread, table


def micro() -> list[str]:
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
