"""What nets learn with delayed gradients, and how large a learning rate they bear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import learning_curves
from benchmarks.learning_runs import BP, Way, families, finals, shown
from benchmarks.learning_runs import summary as summary_of
from benchmarks.learning_study import Study
from benchmarks.learning_verdicts import MARGIN, Verdict, verdicts
from benchmarks.reports.markdown import NOT_MEASURED, load, origin, table

HEADING = "**Learning with delayed gradients** (means over seeds)"
COLORS = ("#D55E00", "#0072B2", "#009E73")
MARKERS = ("o", "s", "^")
SIZES = (11, 8, 5)  # families may lie on each other


def section() -> list[str]:
    results = load("learning")
    if results is None:
        return [HEADING, "", NOT_MEASURED, ""]
    s, ways = results["settings"], ways_of(results)
    return [
        HEADING,
        "",
        f"{case_of(results)}, {s['images']} training images, {s['image_size']}x{s['image_size']} "
        f"pixels (means of 2x2), no augmentation; {s['epochs']} epochs, batch {s['batch_size']}, lr "
        f"{s['lr']:g} with warm-up, divided by 10 at 1/2 and 3/4 of the epochs, momentum "
        f"{s['momentum']:g}, weight decay {s['weight_decay']:g}. Each seed gives every way the same "
        f"first weights and batches. `ddg` knows no shrinking.",
        "",
        *errors(
            f"{case_of(results)}: after {s['epochs']} epochs", summary_of(results["runs"], ways)
        ),
        *_same_rule(results, ways),
        "![test error over the epochs](results/learning_curves.png)",
        "",
        *_rates(results),
        "![largest stable learning rate against K](results/largest_lr.png)",
        "",
        *_claims(_verdicts(results)),
        "Answers are those of a 95 % t interval over seeds (±), paired by seed. A difference that lies "
        "within ± is called noise: as large a one could hide there. Equal is what lies within ±, and is "
        f"known to differ by less than {100 * MARGIN:g} points. Less than half: a gain of half of what "
        "beta = 1 loses would have been seen. A run that diverged counts as guessing.",
        "",
        *origin(results),
    ]


def summary() -> list[str]:
    """For a reader in a hurry."""
    results = load("learning")
    if results is None:
        return [HEADING, "", NOT_MEASURED, ""]
    rows = summary_of(results["runs"], ways_of(results))
    cells = []
    for name, members in families(ways_of(results)).items():
        cells.append([name, *(_brief(rows.get(way.name)) for way in members)])
    stages = range(2, results["settings"]["most_stages"] + 1)
    headings = [f"{case_of(results)}: test error", "bp", *(f"K = {k}" for k in stages)]
    said = [f"- {v.claim}: **{v.answer}** ({v.because})" for v in _verdicts(results)]
    return [HEADING, "", *table(headings, cells), *said, ""]


def _brief(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    error, diverged = row["test_error"], row["diverged"]
    if error is None:
        return f"{diverged} diverged"
    return f"{100 * error['mean']:.2f} %" + (f" ({diverged} diverged)" if diverged else "")


def errors(case: str, rows: dict[str, Any]) -> list[str]:
    """A table of what :func:`benchmarks.learning_runs.summary` gives."""
    headings = [case, "test error", "points above bp, same seeds", "diverged"]
    return table(headings, [[f"`{name}`", *shown(name, row)] for name, row in rows.items()])


def ways_of(results: dict[str, Any]) -> list[Way]:
    return Study(most_stages=results["settings"]["most_stages"]).ways


def case_of(results: dict[str, Any]) -> str:
    s = results["settings"]
    return f"ResNet-{s['model_depth']} on {s['data']}"


def _verdicts(results: dict[str, Any]) -> list[Verdict]:
    return verdicts(results["runs"], ways_of(results), results["settings"]["classes"])


def _claims(found: list[Verdict]) -> list[str]:
    rows = [[v.claim, f"**{v.answer}**", v.because] for v in found]
    return table(["claim", "here", "because"], rows)


def _same_rule(results: dict[str, Any], ways: list[Way]) -> list[str]:
    """At K = 2 ``fdg`` and ``ddg`` are one rule: a check of the runs that costs nothing more."""
    fdg, ddg = (finals(results["runs"], Way(method, 2)) for method in ("fdg", "ddg"))
    both = fdg.keys() & ddg.keys()
    if not both:
        return []
    agree = all(fdg[seed] == ddg[seed] for seed in both)
    said = "and these runs agree to the last digit" if agree else "BUT THESE RUNS DIFFER"
    return [f"At K = 2 and beta = 1 `fdg` and `ddg` are the same rule, {said}.", ""]


# -- learning rates -------------------------------------------------------------------------------


def _rates(results: dict[str, Any]) -> list[str]:
    found = results["largest_lr"]
    if not found:
        return ["Largest stable learning rates: " + NOT_MEASURED, ""]
    s = results["settings"]
    rows = [
        [name, *(_rate(found[way.name]) if way.name in found else "-" for way in members)]
        for name, members in families(ways_of(results)).items()
    ]
    stages = range(2, s["most_stages"] + 1)
    return [
        *table(["largest stable learning rate", "bp", *(f"K = {k}" for k in stages)], rows),
        f"Stable: in {s['probe_updates']} updates (seed 0) all losses are finite, and the mean of the "
        f"last eighth is below nine tenths of guessing's. On a grid of factors √2, which is bisected: "
        f"stability is assumed to end once.",
        "",
    ]


def _rate(found: dict[str, Any]) -> str:
    first, last = found["grid"]
    if found["largest"] is None:
        return f"below {first:g}"
    return f"{found['largest']:.3g}" + (" or more" if found["largest"] == last else "")


# -- pictures -------------------------------------------------------------------------------------


def draw_curves(results: dict[str, Any]) -> Figure:
    return learning_curves.draw(case_of(results), results["runs"], ways_of(results))


def draw_rates(results: dict[str, Any]) -> Figure:
    """A line per family, which begins at BP, K = 1."""
    figure = Figure(figsize=(6.4, 4.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    found = results["largest_lr"]
    groups = families(ways_of(results)).items()
    for (name, members), color, marker, size in zip(groups, COLORS, MARKERS, SIZES, strict=True):
        known = [way for way in members if found.get(way.name, {}).get("largest")]
        rates = [found[way.name]["largest"] for way in known]
        label = "; ".join([name, *_beyond_grid(found, members[1:])])
        stages = [way.stages for way in known]
        axes.plot(
            stages, rates, color=color, label=label, marker=marker, ms=size, lw=size / 3, alpha=0.85
        )
    axes.set_yscale("log", base=2)
    rates = sorted({entry["largest"] for entry in found.values() if entry["largest"]})
    axes.set_yticks(rates, [f"{rate:.3g}" for rate in rates])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(1, results["settings"]["most_stages"] + 1))
    axes.set_xlabel("number of stages K (1: bp)")
    axes.set_ylabel("largest stable learning rate")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    title = "; ".join([case_of(results), *_beyond_grid(found, [BP])])
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def _beyond_grid(found: dict[str, Any], members: list[Way]) -> list[str]:
    """What is known of ways whose largest rate the grid does not hold."""
    known = [(way.name, found[way.name]) for way in members if way.name in found]
    return [
        f"{name}: {_rate(one)}" for name, one in known if one["largest"] in (None, one["grid"][1])
    ]


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "learning_curves": draw_curves,
    "largest_lr": draw_rates,
}
DRAWN_BY = (learning_curves,)
