"""A timeline as a picture: one row per lane that was used, waits hatched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fdg_cuda.files import replacing
from fdg_cuda.layout import Transfer
from fdg_cuda.schedule import Kind
from fdg_cuda.timeline import NAMES, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN_TICKS = 50  # a picture of more has bars nobody can tell apart; the JSON has them all
INCHES_PER_TICK = 0.5
NARROWEST, WIDEST = 10.0, 24.0  # inches
BAR = 0.72  # of a row's height
FONT = 8.0  # points
LEGEND_COLUMNS = 6
SLENDER = 0.004  # of the picture's width: a bar so narrow would vanish between white edges
DIGIT, MARGIN = 0.63, 0.2  # widths, in font sizes
COLORS = {
    Kind.FORWARD.value: "#5b8fc9",
    Kind.BACKWARD.value: "#e07b54",
    Kind.UPDATE.value: "#8d8d8d",
    Kind.COPY_WEIGHTS.value: "#c9a227",
    Kind.SEND_ACTIVATION.value: "#3f9b7a",
    Kind.SEND_ERROR.value: "#9a5fb0",
    Transfer.LOAD_INPUT.value: "#4f6d7a",
    Transfer.LOAD_TARGET.value: "#a3b8c2",
    Transfer.RECEIVE_ACTIVATION.value: "#8ccab2",
    Transfer.RECEIVE_ERROR.value: "#c9a6d6",
    Transfer.READ_METRICS.value: "#d98c9a",
}
OTHER = "#444444"
WAIT = "#c4c4c4"


def draw(path: Path, timeline: Timeline) -> None:
    """Draw at most ``DRAWN_TICKS`` ticks as a PNG.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    view = _View(timeline)
    used = {span.stream for span in view.spans}
    rows = sorted(used, key=lambda stream: (timeline.lanes[stream].stage, stream))
    width = min(max(NARROWEST, INCHES_PER_TICK * view.ticks), WIDEST)
    figure = Figure(figsize=(width, 1.5 + 0.62 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0, view.length)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _label_rows(axes, timeline, rows)
    _draw_bars(axes, timeline, view, rows)
    _draw_epochs(axes, view)
    axes.set_xlabel("milliseconds (a number in a bar is the batch it works on)")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    epochs_above = 16 if len(view.begins) > 1 else 6  # points
    axes.set_title(_title(timeline, view), loc="left", fontsize=11, pad=epochs_above)
    present = {span.code for span in view.spans}
    patches = [Patch(color=COLORS[c], label=NAMES[c]) for c in COLORS if c in present]
    patches += [Patch(color=OTHER, label=NAMES.get(c, c)) for c in sorted(present - COLORS.keys())]
    patches.append(Patch(facecolor="white", edgecolor=WAIT, hatch="/////", label="wait"))
    figure.legend(
        handles=patches,
        loc="outside lower right",
        ncols=min(len(patches), LEGEND_COLUMNS),
        frameon=False,
        fontsize=9,
    )
    figure.canvas.draw()  # the layout is settled now, and the axes have their width
    points = axes.get_window_extent().width * 72 / figure.dpi
    _write_batches(axes, view, rows, points / view.length)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


class _View:
    """What is drawn of a timeline, in milliseconds, the epochs close together."""

    def __init__(self, timeline: Timeline) -> None:
        pairs = sorted({(span.epoch, span.tick) for span in timeline.spans})
        shown = set(pairs[:DRAWN_TICKS])
        self.ticks = len(shown)
        self.complete = len(shown) == len(pairs)
        self.spans = [span for span in timeline.spans if (span.epoch, span.tick) in shown]
        self.begins: list[tuple[int, float]] = []  # (epoch, place)
        self._shift: dict[int, float] = {}  # [epoch] seconds
        self._until: dict[int, float] = {}  # [epoch] where the drawing of waits ends, seconds
        gap = 0.01 * timeline.seconds
        at = 0.0
        for epoch in timeline.epochs:
            ends = [span.end for span in self.spans if span.epoch == epoch.number]
            if not ends:
                break
            cut = (epoch.number, max(span.tick for span in epoch.spans)) not in shown
            until = max(ends) if cut else epoch.end
            self.begins.append((epoch.number, 1e3 * at))
            self._shift[epoch.number] = at - epoch.begin
            self._until[epoch.number] = until
            at += until - epoch.begin + gap
        self.length = 1e3 * (at - gap)

    def bar(self, epoch: int, begin: float, end: float) -> tuple[float, float] | None:
        """(left, width) of what is to be seen of it."""
        if epoch not in self._shift:
            return None
        end = min(end, self._until[epoch])
        if end <= begin:
            return None
        return 1e3 * (begin + self._shift[epoch]), 1e3 * (end - begin)


def _label_rows(axes: Axes, timeline: Timeline, rows: Sequence[int]) -> None:
    compute = {wait.stream for stage in timeline.stages for wait in stage.waits}
    compute |= {span.stream for span in timeline.spans if span.code == Kind.FORWARD.value}
    labels = []
    for stream in rows:
        lane = timeline.lanes[stream]
        busy = timeline.stages[lane.stage].busy
        labels.append(lane.name + (f"\n{100 * busy:.1f} % busy" if stream in compute else ""))
    axes.set_yticks(range(len(rows)), labels)
    for row, (above, below) in enumerate(pairwise(rows)):
        if timeline.lanes[above].stage != timeline.lanes[below].stage:
            axes.axhline(row + 0.5, color="#dddddd", linewidth=0.8, zorder=0)


def _draw_bars(axes: Axes, timeline: Timeline, view: _View, rows: Sequence[int]) -> None:
    waits = [wait for stage in timeline.stages for wait in stage.waits]
    for row, stream in enumerate(rows):
        place = (row - BAR / 2, BAR)
        gaps = [view.bar(w.epoch, w.begin, w.end) for w in waits if w.stream == stream]
        axes.broken_barh(
            [gap for gap in gaps if gap],
            place,
            facecolor="white",
            edgecolor=WAIT,
            hatch="/////",
            linewidth=0,
        )
        of_lane = [span for span in view.spans if span.stream == stream]
        for code in sorted({span.code for span in of_lane}):
            color = COLORS.get(code, OTHER)
            bars = [view.bar(s.epoch, s.begin, s.end) for s in of_lane if s.code == code]
            for slender in (False, True):
                axes.broken_barh(
                    [bar for bar in bars if bar and (bar[1] < SLENDER * view.length) == slender],
                    place,
                    facecolor=color,
                    edgecolor=color if slender else "white",
                    linewidth=0.8 if slender else 0.3,
                )


def _draw_epochs(axes: Axes, view: _View) -> None:
    if len(view.begins) < 2:
        return
    for number, place in view.begins:
        axes.axvline(place, color="#444444", linewidth=0.8, linestyle=":")
        axes.annotate(
            f" epoch {number}", (place, 1.0), xycoords=("data", "axes fraction"), fontsize=FONT
        )


def _write_batches(
    axes: Axes, view: _View, rows: Sequence[int], points_per_millisecond: float
) -> None:
    for span, left, width in _wide_enough(view, points_per_millisecond):
        axes.text(
            left + width / 2,
            rows.index(span.stream),
            str(span.batch),
            ha="center",
            va="center",
            color="white",
            fontsize=FONT,
        )


def _wide_enough(view: _View, points: float) -> Iterator[tuple[Span, float, float]]:
    """What gets a number: all the bars of a lane's kind, if the middle one has room for the longest."""
    kinds: dict[tuple[int, str], list[tuple[Span, float, float]]] = {}
    for span in view.spans:
        bar = view.bar(span.epoch, span.begin, span.end)
        if bar:
            kinds.setdefault((span.stream, span.code), []).append((span, *bar))
    for bars in kinds.values():
        needed = FONT * (DIGIT * max(len(str(span.batch)) for span, _, _ in bars) + MARGIN) / points
        if median(width for _, _, width in bars) >= needed:
            yield from (bar for bar in bars if bar[2] >= 0.8 * needed)


def _title(timeline: Timeline, view: _View) -> str:
    some = "" if view.complete else f", the first {view.ticks} drawn"
    return (
        f"{timeline.method}, K = {timeline.stage_count}, {timeline.ticks} ticks{some}: "
        f"bubble {100 * timeline.bubble:.1f} %"
    )
