"""Puts the measured figures into README.md: python -m benchmarks.tables [--check]

Every figure comes from a file in ``benchmarks/results``; what has no file says "not measured yet".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import all_turns, missing

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: begin (python -m benchmarks.tables) -->", "<!-- figures: end -->"
NOT_MEASURED = "not measured yet"


def load(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        "|" + "---|" * len(headings),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def spread(q: dict[str, float], digits: int = 2) -> str:
    return f"{q['median']:.{digits}f} ({q['q1']:.{digits}f} to {q['q3']:.{digits}f})"


def origin(results: dict[str, Any]) -> list[str]:
    e = results["environment"]
    return [
        f"{e['cpu']}, {e['cores']} cores, torch {e['torch']}, Python {e['python']}, {e['date']}; "
        f"`{e['command']}`",
        "",
    ]


def goal_of(ratio: dict[str, Any]) -> str:
    if ratio["goal"] is None:
        return "none"
    return f"at most {ratio['goal']}" + (": missed" if ratio["median"] > ratio["goal"] else "")


def training_step() -> list[str]:
    results = load("training_step")
    heading = "**Whole training steps** (medians, quartiles in brackets; ratios within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    layout = "channels_last" if s["channels_last"] else "contiguous"
    seconds = [[name, spread(q)] for name, q in results["seconds_per_step"].items()]
    ratios = [[f"{r['of']} / {r['to']}", spread(r, 3), goal_of(r)] for r in results["ratios"]]
    case = f"{s['model']}, batch {s['batch_size']}, 3x32x32, {layout}"
    return [
        heading,
        "",
        *table([case, "seconds per step"], seconds),
        *table(["ratio", "measured", "goal"], ratios),
        *origin(results),
    ]


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


def overhead() -> list[str]:
    results = load("overhead")
    heading = "**Metrics, progress, checkpoints and validation** (medians; ratios within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    milliseconds = [
        [name, spread({key: 1e3 * q[key] for key in ("median", "q1", "q3")}, 1)]
        for name, q in results["seconds_per_batch"].items()
    ]
    ratios = [[f"{r['of']} / {r['to']}", spread(r, 3), goal_of(r)] for r in results["ratios"]]
    case = (
        f"{s['model']}, K = {s['stages']}, batch {s['batch_size']}, {s['batches']} batches (on the way: "
        f"every {s['every']}), {s['validation_batches']} to validate"
    )
    return [
        heading,
        "",
        *table([case, "milliseconds per batch"], milliseconds),
        *table(["ratio", "measured", "goal"], ratios),
        *origin(results),
    ]


def learning() -> list[str]:
    results = load("learning")
    heading = "**Learning**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    rows = [
        [
            f"`{method}`" + (", K = 2" if method != "bp" else ""),
            *(f"{100 * epoch['test_accuracy']:.2f} %" for epoch in run["epochs"]),
        ]
        for method, run in results["runs"].items()
    ]
    epochs = [f"epoch {number + 1}" for number in range(s["epochs"])]
    case = f"{s['data']}, {s['model']}, seed {s['seed']}: test accuracy"
    return [heading, "", *table([case, *epochs], rows), *origin(results)]


def memory() -> list[str]:
    results = load("memory")
    heading = "**Memory per stage**"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    # Files from before "replay" have neither inputs nor times.
    with_inputs = all("input_bytes" in row for rows in results["rows"].values() for row in rows)
    rows = [
        [
            mode,
            str(row["stage"]),
            str(row["delay"]),
            f"{row['weight_copies']} ({row['weight_bytes'] / 1e6:.2f} MB)",
            f"{row['snapshot_bytes'] / 1e6:.2f} MB",
            f"{row['batches']} ({row['activation_bytes'] / 1e6:.0f} MB)",
            *([f"{row['input_bytes'] / 1e6:.1f} MB"] if with_inputs else []),
        ]
        for mode, stages in results["rows"].items()
        for row in stages
    ]
    headings = ["mode", "stage", "D_k", "weight copies", "epoch's snapshot", "batches' activations"]
    headings += ["batches' inputs"] if with_inputs else []
    times = [[mode, spread(q)] for mode, q in results.get("seconds_per_step", {}).items()]
    case = f"{s['model']}, batch {s['batch_size']}, K = {s['stages']}, 3x32x32"
    return [
        f"{heading}: {case}",
        "",
        *table(headings, rows),
        *(table(["mode", "seconds per step, fill and drain included"], times) if times else []),
        *origin(results),
    ]


def auto_cut() -> list[str]:
    results = load("auto_cut")
    heading = "**The automatic cut beside all others** (medians; the ratio within a round)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    s = results["settings"]
    names = {results["automatic"]: "automatic", results["best"]: "fastest of all"}
    if len(names) == 1:
        names = {results["best"]: "automatic, and fastest of all"}
    seconds = results["seconds_per_batch"]
    rows = [[f"{name}: {cut}", spread(seconds[str(cut)], 3)] for cut, name in names.items()]
    ratio = results["ratio"]
    case = f"{s['model']}, K = {s['stages']}, batch {s['batch_size']}: second stage begins at child"
    return [
        heading,
        "",
        *table([case, "seconds per batch"], rows),
        *table(
            ["ratio", "measured", "goal"],
            [["automatic / fastest", spread(ratio, 3), goal_of(ratio)]],
        ),
        *origin(results),
    ]


def cut_time() -> list[str]:
    results = load("cut_time")
    heading = "**From a model to its cut** (medians, quartiles in brackets)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = [
        [name, *(spread(q, 1) for q in parts.values()), f"below {results['goal']:g}"]
        for name, parts in results["models"].items()
    ]
    headings = ["model", "capture, s", "measure and cut, s", "all, s", "goal"]
    return [heading, "", *table(headings, rows), *origin(results)]


def plans() -> list[str]:
    results = load("plan")
    heading = "**Plans beside what happened** (a tick; medians, quartiles in brackets)"
    if results is None:
        return [heading, "", NOT_MEASURED, ""]
    rows = []
    for row in results["rows"]:
        predicted, real = (1e3 * row[name]["median"] for name in ("predicted", "real"))
        off = abs(row["ratio"]["median"] - 1)
        verdict = "" if off <= row["goal"] else ": missed"
        rows.append(
            [
                row["model"],
                str(row["stages"]),
                f"{predicted:.0f}",
                f"{real:.0f}",
                spread(row["ratio"], 3),
                f"within {row['goal']:.0%}{verdict}",
            ]
        )
    headings = ["model", "K", "predicted, ms", "real, ms", "predicted / real", "goal"]
    return [heading, "", *table(headings, rows), *origin(results)]


def gpu() -> list[str]:
    results = load("gpu")
    if results is None:
        return ["**GPU**: " + NOT_MEASURED + ".", "", *gpu_learning()]
    lines = [f"**GPU**: {results['environment']['gpu']}", ""]
    for label, turns in all_turns(results):
        rows = [
            [name, spread(case["ms_per_step"]), f"{case['samples_per_s']['median']:.0f}"]
            for name, case in turns["cases"].items()
        ]
        lines += table([label, "milliseconds per step", "samples per second"], rows)
    lines += gpu_updates(results)
    goals = [
        [goal["name"], f"{goal['measured']:.3g}", gpu_goal_of(goal)] for goal in results["goals"]
    ]
    lines += table(["goal", "measured", "wanted"], goals)
    absent = [f"{name}: {why}" for name, why in missing(results).items()]
    lines += [f"Not measured: {'; '.join(absent)}.", ""] if absent else []
    return [*lines, *origin(results), *gpu_learning()]


def gpu_updates(results: dict[str, Any]) -> list[str]:
    rows = [
        [f"{name}, {size} parameters", f"{case['gb_per_s']['median']:.0f}", share]
        for size, measured in results["sections"].get("update", {}).get("sizes", {}).items()
        for name, case in measured["cases"].items()
        for share in [f"{case['share_of_copy']['median']:.2f}"]
    ]
    return table(["update", "GB/s", "share of a copy's"], rows) if rows else []


def gpu_goal_of(goal: dict[str, Any]) -> str:
    return f"{goal['sense']} {goal['goal']:g}" + ("" if goal["met"] else ": missed")


def gpu_learning() -> list[str]:
    results = load("gpu_learning")
    if results is None:
        return []
    rows = []
    for name, row in results["summary"].items():
        error, above = row["test_error"], row["above_bp"]
        rows.append(
            [
                f"`{name}`",
                f"{100 * error['mean']:.2f} % (sd {100 * error['sd']:.2f}, n = {error['n']})",
                f"{100 * above['mean']:+.2f} (sd {100 * above['sd']:.2f})" if above else "",
            ]
        )
    case = f"{results['model']}, {results['data']}, {results['plan']['epochs']} epochs"
    return [
        "**Learning on a GPU**",
        "",
        *table([case, "test error", "points above bp, same seeds"], rows),
        *origin(results),
    ]


def generated() -> str:
    sections = [
        training_step,
        auto_cut,
        cut_time,
        plans,
        micro,
        overhead,
        learning,
        memory,
        gpu,
    ]
    lines = [line for section in sections for line in section()]
    return "\n".join([BEGIN, "", *lines, END])


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = before + generated() + after
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit("README.md does not show benchmarks/results: python -m benchmarks.tables")
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
