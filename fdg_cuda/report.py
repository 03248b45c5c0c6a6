"""What a training run leaves for people: metrics.csv, curves.png, settings.json, the summary."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdg_cuda.files import replacing
from fdg_cuda.shares import Shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

PER_STAGE = ("busy", "skipped")  # a column per stage
MARKED_EPOCHS = 40  # up to so many, every epoch is a dot of its own


@dataclass(frozen=True)
class EpochRow:
    """One epoch as a row of metrics.csv.

    Attributes:
        epoch: counted from 1.
        lr: learning rate of the epoch's last batch.
        train_loss, train_accuracy: averages over the epoch's samples as they were trained.
        test_loss, test_accuracy: after the epoch.
        seconds: the epoch's training time, without the test.
        samples_per_second: of training.
        data_wait: share of ``seconds`` in which the loader was waited for.
        busy: share of ``seconds`` in which each stage was at work, or None if it was not measured.
        loss_scale: behind the epoch; None where losses are not scaled.
        skipped: updates that each stage left out because of it; None likewise.
        updates: how many each stage had to make, those included; None likewise.

    Accuracies are shares in [0, 1], or None if there are no classes.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    test_loss: float
    test_accuracy: float | None
    seconds: float
    samples_per_second: float
    data_wait: float = 0.0
    busy: tuple[float, ...] | None = None
    loss_scale: float | None = None
    skipped: tuple[int, ...] | None = None
    updates: int | None = None

    @property
    def shares(self) -> Shares:
        """For people."""
        return Shares(self.busy, self.data_wait)

    @property
    def scaling(self) -> str:
        """For people, behind other things: the updates left out, stage by stage; nothing if none."""
        if not any(self.skipped or ()):
            return ""
        left_out = updates_left_out(self.skipped or (), self.updates or 0)
        return f"  {left_out} (scale {self.loss_scale:g})"


def updates_left_out(skipped: Sequence[int], updates: int) -> str:
    """For people, such as ``updates left out: 7 and 5 of 12 per stage``.

    Args:
        skipped: per stage.
        updates: how many each had to make.
    """
    first = ", ".join(map(str, skipped[:-1]))
    counts = f"{first} and {skipped[-1]}" if first else str(skipped[-1])
    return f"updates left out: {counts} of {updates}{' per stage' if first else ''}"


def best_epoch(rows: Sequence[EpochRow]) -> EpochRow | None:
    """The row with the highest test accuracy, the earliest of several; None without any."""
    tested = [row for row in rows if row.test_accuracy is not None]
    return max(tested, key=lambda row: row.test_accuracy or 0.0, default=None)


def percent(share: float | None) -> str:
    """``share`` in [0, 1] as text, such as ``97.5 %``."""
    return "-" if share is None else f"{100 * share:.1f} %"


def write_metrics(path: Path, rows: Sequence[EpochRow]) -> None:
    """Write one line per epoch under a header with the names of :class:`EpochRow`; ``busy`` is a
    column per stage, ``busy_0``, ``busy_1``, ..., as far as any row has it, and so is ``skipped``;
    without scaled losses there are no ``loss_scale`` and ``updates`` either.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        scaled = any(row.loss_scale is not None for row in rows)
        columns = [field.name for field in fields(EpochRow) if field.name not in PER_STAGE]
        if not scaled:
            columns = [name for name in columns if name not in ("loss_scale", "updates")]
        for name in PER_STAGE:
            stages = max((len(getattr(row, name) or ()) for row in rows), default=0)
            columns += [f"{name}_{stage}" for stage in range(stages)]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {
                "lr": float(f"{row.lr:.12g}"),  # 0.0925, not 0.09250000000000001
                "seconds": round(row.seconds, 4),
                "samples_per_second": round(row.samples_per_second, 1),
                "data_wait": round(row.data_wait, 4),
                **{f"busy_{k}": round(share, 4) for k, share in enumerate(row.busy or ())},
                **{f"skipped_{k}": count for k, count in enumerate(row.skipped or ())},
            }
            line = {**asdict(row), **rounded}
            writer.writerow({name: line[name] for name in columns if name in line})


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings`` as JSON.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def draw_curves(path: Path, rows: Sequence[EpochRow], title: str) -> None:
    """Draw loss and accuracy over the epochs, training and test, as a PNG.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, rows, [row.train_loss for row in rows], [row.test_loss for row in rows], "")
    loss.set_ylabel("loss (mean cross-entropy)")
    if any(row.train_loss > 0 and row.test_loss > 0 for row in rows):
        loss.set_yscale("log")
    best = best_epoch(rows)
    _draw(
        accuracy,
        rows,
        [_in_percent(row.train_accuracy) for row in rows],
        [_in_percent(row.test_accuracy) for row in rows],
        f" (best {percent(best.test_accuracy)}, epoch {best.epoch})" if best is not None else "",
    )
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_ylim(top=101)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(
    axes: Axes, rows: Sequence[EpochRow], train: list[float], test: list[float], test_note: str
) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) <= MARKED_EPOCHS else ""
    # Blue and vermilion of Okabe and Ito, which colour-blind readers can tell apart.
    axes.plot(epochs, train, color="#0072B2", marker=marker, markersize=3.5, label="training")
    axes.plot(
        epochs,
        test,
        color="#D55E00",
        marker=marker,
        markersize=3.5,
        linestyle="--",
        label=f"test{test_note}",
    )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(True, which="major", alpha=0.3)
    if rows:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no epoch was finished", ha="center", transform=axes.transAxes)


def _in_percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def summary_table(lines: Mapping[str, str]) -> Table:
    """``lines`` as two columns for a rich console."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table
