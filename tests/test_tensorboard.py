"""What TensorBoard would show of a run."""

from __future__ import annotations

import sys
import time
from itertools import count as numbers
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chains import batches, even_split, mlp

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fdg_cuda import Callback, Checkpoints, EpochResult, FDGRunner, FitStart, History, TensorBoard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left")


@pytest.fixture(autouse=True)
def _one_file_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names, which begin with the second; tests open
    several in one."""
    seconds = numbers(int(time.time()))
    clock = SimpleNamespace(time=lambda: next(seconds))
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


Curve = list[tuple[int, float]]


def curves(folder: Path) -> dict[str, Curve]:
    """(step, value) of every point that is shown, by the curve's name."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def steps(curve: Curve) -> list[int]:
    return [step for step, _ in curve]


def fit(
    board: TensorBoard,
    *,
    epochs: int = 2,
    count: int = 6,
    callbacks: tuple[Callback, ...] = (),
    scheduled: bool = False,
    **options: Any,
) -> History:
    model = mlp()
    runner = FDGRunner(model, ["cpu", "cpu"], split=even_split(len(model), 2), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(runner.optimizer, 0.5) if scheduled else None
    return runner.fit(
        batches(count),
        epochs,
        lr_scheduler=scheduler,
        lr_step="batch",
        callbacks=[board, *callbacks],
        **options,
    )


def test_batches_and_epochs_are_curves_over_all_batches(tmp_path: Path) -> None:
    history = fit(TensorBoard(tmp_path, every=4), scheduled=True)
    shown = curves(tmp_path)
    assert set(shown) == {
        *("batch/loss", "batch/lr", "train/loss", "train/accuracy"),
        *("time/seconds", "time/samples_per_second", "time/data_wait"),
        *("busy/stage_0", "busy/stage_1"),
    }
    assert steps(shown["batch/loss"]) == steps(shown["batch/lr"]) == [4, 8, 12]
    for step, loss in shown["batch/loss"]:
        assert loss == pytest.approx(history.batch_losses[step - 1], rel=1e-6)
    assert [rate for _, rate in shown["batch/lr"]] == [0.5 * 0.5**3, 0.5 * 0.5**7, 0.5 * 0.5**11]
    first, second = history.epochs
    for name, values in {
        "train/loss": (first.loss, second.loss),
        "train/accuracy": (first.accuracy, second.accuracy),
        "time/seconds": (first.seconds, second.seconds),
        "time/samples_per_second": (43 / first.seconds, 43 / second.seconds),
        "time/data_wait": (first.data_wait, second.data_wait),
        "busy/stage_1": tuple(epoch.busy[1] for epoch in history.epochs if epoch.busy),
    }.items():
        assert steps(shown[name]) == [6, 12]
        assert [value for _, value in shown[name]] == pytest.approx(values, rel=1e-6)


def test_the_loss_scale_and_the_updates_it_left_out_are_curves(tmp_path: Path) -> None:
    runner = FDGRunner(mlp().float(), ["cpu", "cpu"], split=[4], precision="float16")
    data = [(x.float() * 1e6, y) for x, y in batches(2)]
    runner.fit(data, callbacks=[TensorBoard(tmp_path)])
    shown = curves(tmp_path)
    assert shown["scale/skipped_0"] == shown["scale/skipped_1"] == [(2, 2.0)]
    assert shown["scale/loss_scale"] == [(2, 2.0**15)]


def test_figures_of_ones_own_are_at_the_present_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)

    class Evaluating(Callback):
        def on_epoch_end(self, result: EpochResult) -> None:
            board.log("test/accuracy", 0.25 * (result.epoch + 1))

        def on_fit_start(self, start: FitStart) -> None:
            board.log("test/accuracy", 0.125)

    with pytest.raises(RuntimeError, match="before fit"):
        board.log("test/accuracy", 0.125)
    fit(board, callbacks=(Evaluating(),))
    board.log("test/final", 0.75)
    shown = curves(tmp_path)
    assert shown["test/accuracy"] == [(0, 0.125), (6, 0.25), (12, 0.5)]
    assert shown["test/final"] == [(12, 0.75)]
    assert "batch/loss" not in shown


class Crash(Callback):
    """At the end of the ``after``-th batch of an epoch."""

    def __init__(self, epoch: int, after: int) -> None:
        self._at = (epoch, after)

    def on_batch_end(self, result: Any) -> None:
        if (result.epoch, result.batch + 1) == self._at:
            raise LookupError


def test_a_run_that_goes_on_continues_the_curves(tmp_path: Path) -> None:
    """What was written behind the checkpoint is trained, and shown, a second time only."""
    board, kept = tmp_path / "board", tmp_path / "checkpoints"
    once = fit(
        TensorBoard(tmp_path / "once"),
        epochs=3,
        checkpoints=Checkpoints(tmp_path / "other", every=4),
    )
    with pytest.raises(LookupError):
        fit(
            TensorBoard(board, every=1),
            epochs=3,
            callbacks=(Crash(1, 6),),
            checkpoints=Checkpoints(kept, every=4),
        )
    assert steps(curves(board)["batch/loss"]) == [*range(1, 13)]
    fit(
        TensorBoard(board, every=1),
        epochs=3,
        callbacks=(Crash(9, 0),),
        checkpoints=Checkpoints(kept, every=4, resume=True),
    )
    shown = curves(board)
    assert steps(shown["batch/loss"]) == [*range(1, 19)]
    losses = [loss for _, loss in shown["batch/loss"]]
    assert losses == pytest.approx(once.batch_losses, rel=1e-6)
    assert steps(shown["train/loss"]) == [6, 12, 18]


def test_another_fit_with_the_same_callback_goes_on(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, every=2)
    fit(board, epochs=1)
    fit(board, epochs=1)
    assert steps(curves(tmp_path)["batch/loss"]) == [2, 4, 6, 8, 10, 12]
    assert steps(curves(tmp_path)["train/loss"]) == [6, 12]


def test_a_run_that_begins_anew_in_the_folder_is_shown_alone(tmp_path: Path) -> None:
    fit(TensorBoard(tmp_path, every=2), epochs=2)
    fit(TensorBoard(tmp_path, every=3), epochs=1)
    assert steps(curves(tmp_path)["batch/loss"]) == [3, 6]


def test_what_was_reported_before_an_exception_is_there(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        fit(TensorBoard(tmp_path, every=1), callbacks=(Crash(1, 2),))
    assert steps(curves(tmp_path)["batch/loss"])[:8] == [*range(1, 9)]


def test_files_can_be_read_at_every_checkpoint(tmp_path: Path) -> None:
    board = tmp_path / "board"
    seen: list[list[int]] = []

    class Look(Callback):
        def on_checkpoint(self, path: Path) -> None:
            seen.append(steps(curves(board)["batch/loss"]))

    fit(
        TensorBoard(board, every=1),
        epochs=1,
        callbacks=(Look(),),
        checkpoints=Checkpoints(tmp_path / "checkpoints", every=4),
    )
    assert seen == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]


def test_a_folder_that_cannot_be_written_ends_the_fit_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(TensorBoard(tmp_path / "file" / "board"))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="every must be 1 or more batches; got 0"):
        TensorBoard("board", every=0)
    with pytest.raises(TypeError, match="folder must be a folder's name; got 3"):
        TensorBoard(3)  # type: ignore[arg-type]


def test_without_tensorboard_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard("board")
