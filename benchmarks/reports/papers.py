"""The papers' figures on CIFAR, and ours beside them."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.papers import TIMES, data_of, published
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, table

COMMAND = "python -m benchmarks.papers --download"
METHODS = {"bp": "BP", "ddg": "DDG", "fdg": "FDG"}
SYMBOLS = {"FDG": "", "FDG, earlier": "†"}  # behind a published error


def section() -> list[str]:
    results = load("papers")
    everything = published()
    lines = [
        "**The papers' protocol on CIFAR** (test errors and times as published, and repeated here)",
        "",
        *([NOT_MEASURED, ""] if results is None else []),
        _protocol(everything),
        "",
    ]
    runs = [] if results is None else list(results["runs"].values())
    for name, title in everything["tables"].items():
        rows = [
            [*_way(row), _published(row["published"]), *([_ours(runs, name, row)] if runs else [])]
            for row in everything["errors"]
            if row["table"] == name
        ]
        headings = [title, "method", "K", "beta", "published error, %"]
        lines += table([*headings, *(["here, % (median of n)"] if runs else [])], rows)
    headings = ["times", "method", "K", "published, s per epoch", "published, % of BP's†"]
    lines += table(
        [*headings, *(["here, s", "here, % of BP's"] if runs else [])],
        [
            [*_way(row)[:3], row["seconds"], row.get("share_of_bp", ""), *_our_times(runs, row)]
            for row in everything["times"]["rows"]
        ],
    )
    lines += _failed(results)
    lines += [f"- {note}" for note in everything["notes"]]
    lines += [f"- Not at hand: {what}." for what in everything["not_at_hand"]]
    lines += ["", *_sources(everything), ""]
    return lines if results is None else [*lines, *origin(results)]


def _protocol(everything: dict[str, Any]) -> str:
    s = everything["protocol"]["settings"]
    milestones = ", ".join(map(str, s["milestones"]))
    return (
        f"The protocol: {s['epochs']} epochs, batch {s['batch_size']}, SGD with momentum "
        f"{s['momentum']:g} and weight decay {s['weight_decay']:g}, learning rate "
        f"{s['lr']:g} divided by {s['lr_decay']:g} behind epochs {milestones}, pad-crop-flip "
        f"augmentation, {everything['protocol']['runs']} runs of each kind. Times are those of short "
        f"runs (`--tables {TIMES}`)."
    )


def _way(row: dict[str, Any]) -> list[str]:
    beta = row.get("beta")
    return [
        row["model"],
        METHODS[row["method"]],
        str(row.get("stages", 1)),
        "" if beta is None else f"{beta:g}",
    ]


def _published(figures: list[dict[str, Any]]) -> str:
    return " / ".join(
        figure["error"]
        + ("\\*" if figure.get("rerun") else "")
        + SYMBOLS[figure.get("source", "FDG")]
        for figure in figures
    )


def _ours(runs: list[dict[str, Any]], name: str, row: dict[str, Any]) -> str:
    beta = None if row["method"] == "bp" else row.get("beta", 1.0)
    wanted = (data_of(name), row["model"], row["method"], row.get("stages", 1), beta)
    found = [
        run
        for run in runs
        if run["what"] == "errors"
        and (run["data"], run["model"], run["method"], run["stages"], run["beta"]) == wanted
    ]
    if not found:
        return NOT_MEASURED
    median = statistics.median([100 * run["test_error"] for run in found])
    epochs = {run["epochs"] for run in found}
    of_protocol = epochs == {published()["protocol"]["settings"]["epochs"]}
    length = "" if of_protocol else f", {'/'.join(map(str, sorted(epochs)))} epochs only"
    return f"{median:.2f} ({len(found)}{length})"


def _our_times(runs: list[dict[str, Any]], row: dict[str, Any]) -> list[str]:
    """Seconds per epoch, and their share of BP's with the same net; nothing if nothing was run."""
    if not runs:
        return []
    seconds = {
        (run["method"], run["stages"]): run["seconds_per_epoch"]
        for run in runs
        if run["what"] == "times" and run["model"] == row["model"]
    }
    ours = seconds.get((row["method"], row.get("stages", 1)))
    if ours is None:
        return [NOT_MEASURED, NOT_MEASURED]
    bp = seconds.get(("bp", 1))
    return [f"{ours:.1f}", NOT_MEASURED if bp is None else f"{100 * ours / bp:.1f}"]


def _failed(results: dict[str, Any] | None) -> list[str]:
    failed = {} if results is None else results["failed"]
    return [f"- Failed: `{name}`: {why}" for name, why in failed.items()]


def _sources(everything: dict[str, Any]) -> list[str]:
    """Whom each figure is from."""
    sources, lines = everything["sources"], []
    for key, symbol in SYMBOLS.items():
        what = f"What is marked {symbol}" if symbol else "Errors and protocol"
        lines.append(
            f"- {what}: [{sources[key]['url']}]({sources[key]['url']}), {_text(sources, key)}."
        )
    key = everything["times"]["source"]
    lines.append(f"- Times: {_text(sources, key)}, {sources[key]['url']}.")
    return lines


def _text(sources: dict[str, Any], key: str) -> str:
    return str(sources[key]["text"])
