"""A callback that writes, per stage, how stale gradients are and how far updates move the weights."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdg_cuda.callbacks import Callback, FitStart
from fdg_cuda.checks import whole
from fdg_cuda.files import replacing
from fdg_cuda.metrics import BatchResult, EpochResult, History
from fdg_cuda.update_measures import UpdateMeasures

if TYPE_CHECKING:
    from fdg_cuda.tensorboard import TensorBoard

logger = logging.getLogger("fdg_cuda")


@dataclass(frozen=True)
class StageRow:
    """One update of one stage, a row of the file.

    Attributes:
        step: batches trained since training began, that of the row included.
        epoch, batch: counted from 1, the batch within its epoch.
        stage: counted from 0.
        staleness: updates between the weights from which the gradient was computed and those it was
            applied to, as the schedule has it: with ``accumulate`` of the oldest gradient; with
            ``backward_weights="current"`` of the activations; with ``"replay"`` 0, since all is
            computed again. It grows while the pipeline fills.
        update_ratio: norm of the change of the stage's weights over the norm of the weights before it.
        loss: of the batch.
    """

    step: int
    epoch: int
    batch: int
    stage: int
    staleness: int
    update_ratio: float
    loss: float


COLUMNS = [field.name for field in fields(StageRow)]


class StageLog(Callback):
    """Writes a row per stage into a CSV file: ``fit(callbacks=[StageLog("out/stages.csv")])``.

    Every ``every`` batches, counted over all epochs, each stage measures its update: see
    :class:`StageRow`. With ``accumulate`` an update that any such batch has a part in is measured, at
    its last batch. Stages without parameters have no rows.

    Rows are written when an epoch ends, and before every checkpoint; of an epoch that is broken off
    otherwise there are none, or if it diverged those as far as it had come. With checkpoints a run that
    goes on goes on with its rows, and what it wrote behind the checkpoint is dropped. A second
    ``fit`` with the same log goes on behind the first; with a new log the file is written over.

    Training does the same to the bit. A measured update costs a few passes over the stage's weights
    and memory for at most two more copies of them; nothing waits for a device before the epoch, or
    the part of it before a checkpoint, ends. With a log every update is started by Python, the fused
    one too.

    Args:
        path: of the file; its folder is made if it is not there.
        every: batches from one measured update to the next.
        board: where the figures go too, as ``staleness/stage_0`` and ``update_ratio/stage_0``, and
            so on; it must stand in ``callbacks`` before this.

    Raises:
        TypeError, ValueError: an argument that cannot work.
    """

    def __init__(
        self, path: str | os.PathLike[str], every: int = 50, board: TensorBoard | None = None
    ) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a file name, such as out/stages.csv; got {path!r}")
        self._path = Path(path)
        if self._path.is_dir():
            raise ValueError(f"path {str(path)!r} is a folder; give the name of a file in it")
        self.measures: UpdateMeasures = UpdateMeasures(whole("every", every, 1, "batches"))
        self._board = board
        self._results: dict[int, BatchResult] = {}  # by step, since the latest rows

    def flush(self) -> None:
        """Write what was measured up to the point at which the pipeline was drained last.

        Raises:
            OSError: the file cannot be written.
        """
        rows = list(self._rows())
        self._forget()
        if rows:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(map(asdict, rows))
        if self._board is not None:
            for row in rows:
                self._board.log(f"staleness/stage_{row.stage}", row.staleness, row.step)
                self._board.log(f"update_ratio/stage_{row.stage}", row.update_ratio, row.step)

    def _rows(self) -> Iterator[StageRow]:
        for found in self.measures.found:
            result = self._results[found.step]
            yield StageRow(
                found.step,
                result.epoch + 1,
                result.batch + 1,
                found.stage,
                found.staleness,
                found.update_ratio,
                result.loss,
            )

    def _forget(self) -> None:
        self._results = {}
        self.measures.found = []

    # -- moments --------------------------------------------------------------------------------

    def on_fit_start(self, start: FitStart) -> None:
        self._forget()
        steps = self.measures.steps
        kept = _lines_up_to(self._path, steps) if steps else []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            text = "".join(f"{line}\n" for line in (",".join(COLUMNS), *kept))
            temporary.write_text(text, encoding="utf-8")

    def on_batch_end(self, result: BatchResult) -> None:
        self.measures.steps += 1
        self._results[self.measures.steps] = result

    def on_epoch_end(self, result: EpochResult) -> None:
        self.flush()

    def on_fit_end(self, history: History) -> None:
        self.flush()

    def on_exception(self, error: BaseException) -> None:
        try:
            self.flush()
        except Exception as trouble:  # the error that ends training matters more
            logger.warning("%s is incomplete: %s", self._path, trouble)

    def state_dict(self) -> dict[str, Any]:
        # A checkpoint must not know of batches whose rows a kill could still take away.
        self.flush()
        return {"step": self.measures.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measures.steps = state["step"]


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The rows of the file up to ``step``; none if it is not there or of another kind."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole_lines = text.split("\n")[:-1]
    if whole_lines[:1] != [",".join(COLUMNS)]:
        return []
    return [line for line in whole_lines[1:] if int(line.partition(",")[0]) <= step]
