"""The files and tables of a run: complete, legible to other programs, never half written."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from fdg_cuda.files import replacing
from fdg_cuda.metrics import BatchResult
from fdg_cuda.progress import LiveProgress, PlainProgress, make_progress
from fdg_cuda.report import (
    EpochRow,
    best_epoch,
    draw_curves,
    percent,
    summary_table,
    updates_left_out,
    write_metrics,
    write_settings,
)
from fdg_cuda.shares import Shares
from fdg_cuda.weights import finite, save_weights

NAN = math.nan


def row(epoch: int, accuracy: float | None = 0.5, loss: float = 0.25) -> EpochRow:
    return EpochRow(epoch, 0.1, loss, accuracy, 2 * loss, accuracy, 1.23456789, 987.654)


def colours(picture: Path) -> int:
    pixels = imread(picture)
    return len({tuple(pixel) for line in pixels[::3, ::3] for pixel in line})


def test_metrics_name_their_columns_and_keep_every_digit_of_the_losses(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    write_metrics(file, [row(1, loss=1 / 3), row(2, accuracy=None)])
    with file.open(newline="") as opened:
        first, second = csv.DictReader(opened)
    assert list(first) == [
        "epoch",
        "lr",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
        "samples_per_second",
        "data_wait",
    ]
    assert float(first["train_loss"]) == 1 / 3
    assert first["epoch"] == "1"
    assert first["seconds"] == "1.2346"
    assert first["samples_per_second"] == "987.7"
    assert second["test_accuracy"] == ""


def test_metrics_have_a_column_for_each_stages_busy_share(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    unmeasured = row(1)
    measured = replace(row(2), busy=(0.971234, 0.5), data_wait=1 / 3)
    write_metrics(file, [unmeasured, measured])
    with file.open(newline="") as opened:
        first, second = csv.DictReader(opened)
    assert list(first)[-3:] == ["data_wait", "busy_0", "busy_1"]
    assert [first["busy_0"], first["busy_1"], first["data_wait"]] == ["", "", "0.0"]
    assert [second["busy_0"], second["busy_1"]] == ["0.9712", "0.5"]
    assert second["data_wait"] == "0.3333"


def test_metrics_have_the_loss_scale_and_the_updates_left_out_where_there_are_any(
    tmp_path: Path,
) -> None:
    file = tmp_path / "metrics.csv"
    write_metrics(file, [replace(row(1), loss_scale=1024.0, skipped=(3, 0), updates=12)])
    with file.open(newline="") as opened:
        (only,) = csv.DictReader(opened)
    assert list(only)[-5:] == ["data_wait", "loss_scale", "updates", "skipped_0", "skipped_1"]
    assert list(only.values())[-4:] == ["1024.0", "12", "3", "0"]


def test_an_epochs_line_says_which_updates_were_left_out() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    progress = PlainProgress(console, 2, 10)
    progress.epoch(replace(row(1), loss_scale=1024.0, skipped=(3, 0), updates=12))
    progress.epoch(replace(row(2), loss_scale=1024.0, skipped=(0, 0), updates=12))
    first, second = console.export_text().splitlines()
    assert "updates left out: 3 and 0 of 12 per stage (scale 1024)" in first
    assert "left out" not in second


@pytest.mark.parametrize(
    ("skipped", "text"), [((7,), "7 of 12"), ((7, 5, 0), "7, 5 and 0 of 12 per stage")]
)
def test_updates_left_out_by_stage(skipped: tuple[int, ...], text: str) -> None:
    assert updates_left_out(skipped, 12) == f"updates left out: {text}"


def test_a_batch_without_a_finite_loss_is_no_part_of_the_bars_average() -> None:
    console = Console(width=200, file=io.StringIO())
    progress = LiveProgress(console, 1, 4)
    for loss in (0.5, NAN, 1.5):
        progress.batch(BatchResult(0, 0, loss, 8, 4))
    assert "loss 1.0000" in progress._status(1)


def test_metrics_before_the_first_epoch_are_a_header(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", [])
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [row(1)],
        [row(n, n / 60) for n in range(1, 60)],
        [row(1), row(2, loss=NAN), row(3, accuracy=None)],
        [row(1, loss=0.0)],
    ],
    ids=["one epoch", "many", "not a number", "no loss left"],
)
def test_curves_are_a_picture_of_two_panels(tmp_path: Path, rows: list[EpochRow]) -> None:
    draw_curves(tmp_path / "curves.png", rows, "resnet20 on digits")
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert width > 2 * height
    assert colours(tmp_path / "curves.png") > 20


def test_curves_without_an_epoch_say_so(tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", [], "resnet20 on digits")
    assert imread(tmp_path / "curves.png").size


def test_the_best_epoch_is_the_first_of_equals() -> None:
    rows = [row(1, 0.5), row(2, 0.9), row(3, None), row(4, 0.9)]
    assert best_epoch(rows) == rows[1]
    assert best_epoch([row(1, None)]) is None


def test_percent() -> None:
    assert percent(0.97514) == "97.5 %"
    assert percent(None) == "-"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_settings_are_json(tmp_path: Path) -> None:
    write_settings(tmp_path / "settings.json", {"split": (3, 7), "lr": 0.1})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"split": [3, 7], "lr": 0.1}


def test_weights_come_back_with_their_metadata_in_alphabetical_order(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    shared = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    weights = {"z.weight": shared, "a": shared.double(), "steps": torch.tensor(3), "same": shared}
    metadata = {key: f"{key} é" for key in "qwertzuiopasdfghjkl"}
    file = tmp_path / "weights.safetensors"
    save_weights(file, weights, metadata)
    loaded = safetensors.load_file(file)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert all(value.is_contiguous() for value in loaded.values())
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0
    assert header["__metadata__"] == metadata
    assert list(header["__metadata__"]) == sorted(metadata)


def test_weights_are_finite_or_not() -> None:
    assert finite({"w": torch.ones(2), "steps": torch.tensor(3)})
    assert not finite({"w": torch.ones(2), "b": torch.tensor([1.0, NAN])})
    assert not finite({"w": torch.tensor(math.inf)})


def test_a_summary_is_two_columns() -> None:
    console = Console(width=60)
    with console.capture() as captured:
        console.print(summary_table({"model": "mlp [bold]", "time": "2 s"}))
    assert captured.get().split() == ["model", "mlp", "[bold]", "time", "2", "s"]


def test_a_file_gets_one_line_per_epoch() -> None:
    console = Console(width=200, force_terminal=False)
    progress = make_progress(console, epochs=20, batches=1)
    assert type(progress) is PlainProgress
    with console.capture() as captured, progress:
        for epoch in (1, 2):
            progress.batch(BatchResult(0, epoch - 1, 0.25, 8, 4))
            progress.epoch(replace(row(epoch), busy=(0.97, 0.84), data_wait=0.03))
    lines = captured.get().splitlines()
    assert len(lines) == 2
    assert "data 3 %" in lines[1]
    for part in (
        "epoch  2/20",
        "lr 0.1",
        "loss 0.2500",
        "50.0 %",
        "988 samples/s",
        "busy 97 84 %",
        "left",
    ):
        assert part in lines[1]


def test_a_terminal_gets_a_bar_and_lines_of_at_most_80_columns() -> None:
    console = Console(width=80, force_terminal=True, markup=False, highlight=False)
    progress = make_progress(console, epochs=300, batches=2)
    assert type(progress) is LiveProgress
    with console.capture() as captured, progress:
        progress.batch(BatchResult(0, 0, 0.25, 8, 4))
        progress.batch(BatchResult(1, 0, 0.75, 8, 8))
        progress.epoch(row(1))
        progress.batch(BatchResult(0, 1, 0.25, 8, None))
    text = captured.get()
    line = next(line for line in text.splitlines() if "train loss" in line)
    assert "test loss 0.5000" in line, "the line was wrapped"
    assert "epoch 2/300" in text


def test_the_bar_averages_over_the_samples_of_the_epoch_so_far() -> None:
    progress = LiveProgress(Console(force_terminal=True), epochs=3, batches=2)
    progress.batch(BatchResult(0, 0, 0.25, 30, 15))
    progress.batch(BatchResult(1, 0, 1.25, 10, 5))
    assert "loss 0.5000  acc 50.0 %" in progress._status(1)


@pytest.mark.parametrize("stages", [1, 2, 4, 64])
def test_the_bar_shows_the_stages_shares_within_80_columns(stages: int) -> None:
    shares = Shares(tuple(0.9 - stage / 100 for stage in range(stages)), 0.12)
    console = Console(width=80, force_terminal=True, markup=False, highlight=False)
    progress = make_progress(console, 300, 2, lambda: shares)
    with console.capture() as captured, progress:
        for batch in range(2):
            progress.batch(BatchResult(batch, 0, 2.25, 8, 8))
    text = captured.get()
    assert f"{shares}" in text
    assert " left" in text


def test_a_bar_that_does_not_know_the_shares_leaves_them_out() -> None:
    progress = LiveProgress(Console(force_terminal=True), epochs=3, batches=2)
    progress.batch(BatchResult(0, 0, 0.25, 8, 4))
    assert "busy" not in progress._status(1)
