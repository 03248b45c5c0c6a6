"""Brings ``fit`` together with what a run from the command line writes and shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdg_cuda.callbacks import Callback, FitStart
from fdg_cuda.metrics import BatchResult, EpochResult, History
from fdg_cuda.progress import PlainProgress
from fdg_cuda.stage_log import StageLog
from fdg_cuda.tensorboard import TensorBoard

if TYPE_CHECKING:
    from fdg_cuda.train import Training


class Reporting(Callback):
    """One callback, so that a run may go on with or without TensorBoard and the log of stages.

    Args:
        training: the run, with its files and rows.
        progress: shown meanwhile.
        board, log: told of everything, if there are any.
    """

    def __init__(
        self,
        training: Training,
        progress: PlainProgress,
        board: TensorBoard | None,
        log: StageLog | None,
    ) -> None:
        self._training = training
        self._progress = progress
        self._board = board
        self._log = log
        # TensorBoard first: the log writes into it, as this does.
        self._views: list[Callback] = [view for view in (board, log) if view is not None]
        self._step = 0  # batches trained since training began
        self.measures = None if log is None else log.measures

    def on_fit_start(self, start: FitStart) -> None:
        for view in self._views:
            view.on_fit_start(start)
        self._progress.start(start)

    def on_batch_end(self, result: BatchResult) -> None:
        self._step += 1
        for view in self._views:
            view.on_batch_end(result)
        self._progress.batch(result)

    def on_epoch_end(self, result: EpochResult) -> None:
        row = self._training.finish_epoch(result)
        if self._log is not None:
            self._log.on_epoch_end(result)
        if self._board is not None:
            self._board.log("test/loss", row.test_loss)
            if row.test_accuracy is not None:
                self._board.log("test/accuracy", row.test_accuracy)
            self._board.on_epoch_end(result)  # which makes TensorBoard see all of them
        self._progress.epoch(row)

    def on_checkpoint(self, path: Path) -> None:
        for view in self._views:
            view.on_checkpoint(path)

    def on_exception(self, error: BaseException) -> None:
        for view in reversed(self._views):  # TensorBoard closes last
            view.on_exception(error)

    def on_fit_end(self, history: History) -> None:
        for view in reversed(self._views):
            view.on_fit_end(history)

    def state_dict(self) -> dict[str, Any]:
        if self._log is not None:
            self._log.flush()  # as its own state_dict does
        return {**self._training.state_dict(), "step": self._step}

    def check_state(self, state: dict[str, Any]) -> None:
        self._training.check_settings(state["settings"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._training.load_state_dict(state)
        self._step = state["step"]
        for view in self._views:
            view.load_state_dict({"step": self._step})
