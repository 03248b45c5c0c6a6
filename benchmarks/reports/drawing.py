"""What the pictures of the sections share: colours, a sheet to draw on, bars with quartiles."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#9A9A9A"


def sheet(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bare(axes: Axes) -> None:
    """Without the lines above and right of what is drawn."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def bars(axes: Axes, cases: Mapping[str, Mapping[str, float]], ours: str, digits: int = 2) -> None:
    """A horizontal bar per case at its median, whiskers at its quartiles, the first case on top.

    Args:
        cases: by name, what ``harness.quartiles`` gave.
        ours: what the names of the cases begin with that stand out.
    """
    names, spreads = list(cases), list(cases.values())
    middles = [q["median"] for q in spreads]
    whiskers = [
        [q["median"] - q["q1"] for q in spreads],
        [q["q3"] - q["median"] for q in spreads],
    ]
    colors = [BLUE if name.startswith(ours) else GREY for name in names]
    drawn = axes.barh(range(len(names)), middles, xerr=whiskers, color=colors, capsize=3)
    axes.bar_label(drawn, [f"{middle:.{digits}f}" for middle in middles], padding=5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(q["q3"] for q in spreads))
    bare(axes)
