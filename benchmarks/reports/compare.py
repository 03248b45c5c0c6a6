"""What could be used instead, side by side."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare_cases import EVERY_MODEL
from benchmarks.compare_ways import OURS, PEER
from benchmarks.cuts import WORTH_CAPTURING, said
from benchmarks.reports.goals import Goal
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, spread, table
from benchmarks.steps import SETTLING

Row = dict[str, Any]
HEADING = "**What could be used instead** (whole training steps, two CPU cores)"
SUBJECT_COLOR, OURS_COLOR, OTHER_COLOR = "#c2314a", "#e9a5ad", "#aab4c2"
MILLI = 1e3
PLAIN = ("bp-2", "bp-2-kept")
NOTES = [
    "A step is forward, backward and update of the whole batch (SGD with momentum and weight "
    "decay), the data in memory. Every way runs in a process of its own, or two, with one "
    "intra-op thread each (BP with two threads: two). All pipelines are cut between the same two "
    "children (residual blocks), the best such cut by what layers take. Where the same times predict, "
    f"before any race, that a cut inside a child is faster by {WORTH_CAPTURING - 1:.0%} or more, the "
    "runner's own stages are cut there: `FDGRunner(..., capture=True)` (the tables of the models say "
    "where). Convolutional nets are in channels_last. But gloo sends contiguous tensors only, so 1F1B "
    "and GPipe have to convert what they send; where a trial finds the whole net in contiguous layout "
    "faster, they run so (marked).",
    "",
    "1F1B, GPipe and torchgpipe divide the batch into micro-batches and DDP into halves, and "
    "batch norm then takes its statistics from the part: nets with batch norm do not compute what "
    "BP computes. `fdg`, `ddg` and threads per batch see whole batches, with delayed gradients. "
    "torchgpipe leaves the order of the backward to autograd, which has one thread for all CPU "
    "devices: of its stages only the forward overlaps.",
    "",
    "While it trains, the runner keeps the memory of tensors that are freed for those that come next, "
    "which saves page faults and waits for the C library's lock (`FDG_KEEP_FREED_MEMORY=0` leaves it "
    "alone); no other way does by itself. `kept memory` is BP with the same in its process: what of the "
    "gain is due to it.",
    "",
    "With two stages `fdg` and `ddg` are the same rule but for beta (with the same beta they give the "
    "same bits), with as many batches in flight: what they make a stage wait for is the same, too, and "
    "the same time is what to expect. Which of them is ahead by the median is chance, and shows how "
    "much of it there is; the goal is missed where three quarters of the rounds say that `fdg` is "
    "slower. `fdg` can be ahead from K = 3 on, where a batch crosses all stages of `ddg` within one "
    "tick.",
    "",
    "`fdg` and `ddg` are timed in the steady state, from one batch's loss to the next. Fill and "
    "drain come once per epoch: N batches take about as long as N + K - 1 such steps. Every turn is a "
    f"`fit` of its own, of which neither the fill is timed nor the {SETTLING} steps behind it, in which "
    "the memory that the `fit` before gave back is asked for again.",
    "",
    "Memory is the peak resident set (`VmHWM`), summed over the way's processes; in brackets what "
    "was resident before the model was made: Python, torch and its libraries, once per process.",
    "",
]


def section() -> list[str]:
    results = load("compare")
    if results is None:
        return [HEADING, "", NOT_MEASURED, ""]
    cases = in_order(results["cases"])
    return [
        HEADING,
        "",
        "![Time per step relative to BP with two threads](results/compare.png)",
        "",
        *NOTES,
        *of_sittings(results["settings"].get("sittings", 1)),
        f"The models, by name and batch size: {said_of_models(cases)}.",
        "",
        "Two goals were set before anything was measured: `fdg` is to be the fastest of all in "
        "convolutional nets, which the papers are about, and never slower than threads per batch. The "
        "first one's part against this runner's own `ddg` was set apart when it was seen that both "
        "compute the same.",
        "",
        "The time of `fdg` over that of each way, medians of ratios within a round; below 1 `fdg` is "
        "faster.",
        "",
        *ratios(cases),
        *goal_table(in_order(results["goals"])),
        "Each model by itself: medians, quartiles in brackets.",
        "",
        *(line for model in unique(cases) for line in details(model, cases)),
        *errors(cases),
        idle(cases),
        "",
        *origin(results),
    ]


def summary() -> list[str]:
    """A few columns, a row per case."""
    results = load("compare")
    if results is None:
        return [HEADING, "", NOT_MEASURED, ""]
    rows, cases = [], in_order(results["cases"])
    for case in cases:
        ways = case["ways"]
        peers = [way for way in measured(case).values() if way["kind"] == PEER]
        best = min(peers, key=seconds, default=None)
        fdg = ways.get("fdg", {})
        rows.append(
            [
                title(case),
                f"{MILLI * seconds(fdg):.0f}" if "seconds_per_step" in fdg else "failed",
                *(ratio(ways.get(name)) for name in (*PLAIN, "ddp")),
                f"{ratio(best)} ({best['label']})" if best else "",
                ratio(ways.get("published")),
            ]
        )
    headings = [
        *(
            "`fdg` K = 2, time of a step",
            "ms",
            "/ BP, 2 threads",
            "/ the same, kept memory",
            "/ DDP",
        ),
        *("/ fastest pipeline of others", "/ threads per batch"),
    ]
    below = "A step of `fdg` over one of each way, on two CPU cores: below 1 `fdg` is faster."
    kept = "Kept memory: BP whose process keeps freed memory as the runner's does."
    return [
        *gain(cases),
        f"{below} {kept} {said_of_models(cases)}.",
        "",
        *table(headings, rows),
        *origin(results),
    ]


def gain(cases: list[Row]) -> list[str]:
    """What a step takes less than with BP, by kind of model; nothing if a case failed or takes more."""
    kinds: dict[str, list[Row]] = {}
    for case in cases:
        name = case["model"]
        kinds.setdefault(
            "convolutional nets" if EVERY_MODEL[name].convolutional else f"the {name}", []
        ).append(case)
    found = []
    for kind, members in kinds.items():
        if any({"fdg", *PLAIN} - measured(case).keys() for case in members):
            return []
        ratios = [[case["ways"][way]["fdg_ratio"]["median"] for case in members] for way in PLAIN]
        if max(map(max, ratios)) >= 1:
            return []
        plain, kept = map(less, ratios)
        found.append(f"{plain} ({kept}) in {kind}")
    return [
        f"Beside plain BP with both cores a step of `fdg` takes less time by {', '.join(found)}; in "
        "brackets: where BP's process keeps freed memory, as the runner's does.",
        "",
    ]


def less(ratios: list[float]) -> str:
    low, high = (f"{100 * (1 - ratio):.0f}" for ratio in (max(ratios), min(ratios)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def of_sittings(count: int) -> list[str]:
    if count == 1:
        return []
    return [
        f"The processes of all ways were started {count} times for each case: two processes of the same "
        "program differ by some percent for as long as they live. Quartiles are over all rounds; "
        "those of each start are in the file (`seconds_by_sitting`).",
        "",
    ]


def said_of_models(cases: list[Row]) -> str:
    names: dict[str, list[str]] = {}
    for name in unique(cases):
        names.setdefault(EVERY_MODEL[name].what, []).append(name)
    return "; ".join(f"{', '.join(alike)}: {what}" for what, alike in names.items())


def in_order(rows: list[Row]) -> list[Row]:
    """By model and batch size, in whichever order they were measured."""
    models = list(EVERY_MODEL)
    return sorted(rows, key=lambda row: (models.index(row["model"]), row["batch_size"]))


def goals() -> list[Goal]:
    results = load("compare")
    if results is None:
        return [Goal("`fdg` beside all others in convolutional nets", "fastest")]
    return [
        Goal(
            f"{title(goal)}: `fdg` / {goal['other']} ({goal['name']})",
            wanted(goal),
            f"{goal[goal['judged_by']]:.3f}",
            goal["met"],
        )
        for goal in in_order(results["goals"])
    ]


def picture(results: Row) -> Figure:
    """Bars per case: the time of a step relative to BP with two threads."""
    cases = in_order(results["cases"])
    sizes = sorted({case["batch_size"] for case in cases})
    models = unique(cases)
    count = max(len(case["ways"]) for case in cases)
    figure = Figure(
        figsize=(2.0 + 4.0 * len(sizes), 1.0 + (0.7 + 0.2 * count) * len(models)),
        layout="constrained",
    )
    grid = figure.subplots(len(models), len(sizes), squeeze=False, sharex="row", sharey="row")
    for axes in grid.flat:
        axes.set_visible(False)
    for case in cases:
        axes = grid[models.index(case["model"])][sizes.index(case["batch_size"])]
        axes.set_visible(True)
        bars(axes, case)
    figure.supxlabel(
        "time of a step, BP with 2 threads = 1 (whiskers: quartiles); shorter is faster",
        fontsize=9,
    )
    return figure


def bars(axes: Axes, case: Row) -> None:
    ways = list(case["ways"].items())[::-1]
    for height, (name, way) in enumerate(ways):
        relative = way.get("to_bp_2")
        if relative is None:
            axes.text(0.02, height, "failed" if "error" in way else "", va="center", fontsize=7)
            continue
        middle = relative["median"]
        whisker = [[middle - relative["q1"]], [relative["q3"] - middle]]
        color = OURS_COLOR if way["kind"] == OURS else OTHER_COLOR
        if name == "fdg":
            color = SUBJECT_COLOR
        axes.barh(height, middle, xerr=whisker, color=color, height=0.75, error_kw={"lw": 0.8})
        axes.text(
            relative["q3"],
            height,
            f"  {middle:.2f}",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
            zorder=1.5,  # over the line at 1, under the whisker
        )
    axes.set_yticks(range(len(ways)), [way["label"] for _, way in ways], fontsize=8)
    axes.axvline(1.0, color="black", lw=0.8, ls=":", zorder=1.2)
    axes.margins(x=0.12)
    axes.set_title(f"{case['model']}, batch {case['batch_size']}", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def ratios(cases: list[Row]) -> list[str]:
    ways = labels(cases)
    rows = [
        [label, *(ratio(case["ways"].get(name)) for case in cases)]
        for name, label in ways.items()
        if name != "fdg"
    ]
    return table(["`fdg` K = 2 over", *map(title, cases)], rows)


def wanted(goal: Row) -> str:
    limit = f"at most {goal['goal']:g}"
    return f"lower quartile {limit}" if goal["judged_by"] == "q1" else limit


def goal_table(found: list[Row]) -> list[str]:
    rows = [
        [
            f"{goal['name']}: {title(goal)}",
            goal["other"],
            spread(goal, 3),
            wanted(goal) + ("" if goal["met"] else ": missed"),
        ]
        for goal in found
    ]
    return table(["goal", "against", "`fdg` / it", "wanted"], rows) if rows else []


def details(model: str, cases: list[Row]) -> list[str]:
    mine = [case for case in cases if case["model"] == model]
    headings = [model]
    for case in mine:
        size = f"batch {case['batch_size']}, cut at {said(case['cuts'])}"
        headings += [f"{size}: ms per step", "`fdg` / it", "peak MB"]
    rows = []
    for name, label in labels(mine).items():
        row = [label]
        for case in mine:
            way = case["ways"].get(name, {})
            if "seconds_per_step" not in way:
                row += ["failed" if "error" in way else "", "", ""]
                continue
            times = {key: MILLI * value for key, value in way["seconds_per_step"].items()}
            row += [
                spread(times, 1)
                + (
                    ", contiguous"
                    if case["convolutional"] and way["layout"] == "contiguous"
                    else ""
                ),
                spread(way["fdg_ratio"], 3) if way["fdg_ratio"] else "",
                f"{way['peak_bytes'] / 1e6:.0f} ({way['start_bytes'] / 1e6:.0f})",
            ]
        rows.append(row)
    return table(headings, rows)


def errors(cases: list[Row]) -> list[str]:
    rows = [
        [way["label"], title(case), f"`{way['error']}`"]
        for case in cases
        for way in case["ways"].values()
        if "error" in way
    ]
    return table(["failed", "case", "error"], rows) if rows else []


def idle(cases: list[Row]) -> str:
    shares = [way["idle_cpu_share"] for case in cases for way in measured(case).values()]
    return (
        f"While others had their turn no way used more than {max(shares, default=0):.1%} of a core."
    )


def measured(case: Row) -> dict[str, Row]:
    return {name: way for name, way in case["ways"].items() if "seconds_per_step" in way}


def seconds(way: Row) -> float:
    return float(way["seconds_per_step"]["median"])


def ratio(way: Row | None) -> str:
    """fdg over it."""
    if way is None or ("error" not in way and way["fdg_ratio"] is None):
        return ""
    return "failed" if "error" in way else f"{way['fdg_ratio']['median']:.2f}"


def labels(cases: list[Row]) -> dict[str, str]:
    return {name: way["label"] for case in cases for name, way in case["ways"].items()}


def title(case: Row) -> str:
    return f"{case['model']}, {case['batch_size']}"


def unique(cases: list[Row]) -> list[str]:
    return list(dict.fromkeys(case["model"] for case in cases))
