"""The training command: a model and a data set by name, trained, tested each epoch, and written."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fdg_cuda import __version__, data, lr_schedule, named_optimizer
from fdg_cuda.checkpoint import CheckpointFolder
from fdg_cuda.checkpoints import Checkpoints
from fdg_cuda.devices import parse_devices
from fdg_cuda.errors import CheckpointError, NonFiniteLossError, TrainingStopped
from fdg_cuda.metrics import EpochResult
from fdg_cuda.model_names import find_model, is_convolutional
from fdg_cuda.names import counted
from fdg_cuda.progress import make_progress
from fdg_cuda.report import (
    EpochRow,
    best_epoch,
    draw_curves,
    percent,
    updates_left_out,
    write_metrics,
    write_settings,
)
from fdg_cuda.reporting import Reporting
from fdg_cuda.runner import FDGRunner
from fdg_cuda.same_run import RECORD, check_folder, differences, free_folder, with_effect
from fdg_cuda.settings import GRAPHS, Settings
from fdg_cuda.stage_log import StageLog
from fdg_cuda.tensorboard import TensorBoard
from fdg_cuda.timeline import Timeline
from fdg_cuda.trace_window import read_window
from fdg_cuda.weights import finite, save_weights

TEST_BATCH_SIZE = 512
MOST_STAGES_MEANT = 16  # a single device of a higher number is no number of stages

# In the folder of the results.
TENSORBOARD, STAGES, TRACE, PICTURE = "tensorboard", "stages.csv", "trace.json", "trace.png"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: ``"finished"``, ``"stopped"`` (at a checkpoint), ``"interrupted"`` (Ctrl-C) or
            ``"diverged"``.
        rows: one per finished epoch.
        seconds: from the first batch to the last epoch's test.
        files: what was written, in ``settings.out``.
        settings: with the split that was used.
        message: why a run diverged or was stopped, or had nothing to do.
    """

    status: str
    rows: list[EpochRow]
    seconds: float
    files: list[str]
    settings: Settings
    message: str = ""


class Training:
    """A run made ready: data loaded, model built, folder made.

    Args:
        settings: what to train and how.
        resume: see :class:`~fdg_cuda.Checkpoints`.
        overwrite: see there; a finished run with other settings is replaced too.

    Raises:
        ValueError, TypeError, ImportError, OSError, RuntimeError: settings that cannot work here;
            the message says what would.
    """

    def __init__(
        self, settings: Settings, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        named = settings.out
        settings = settings.completed(threads=torch.get_num_threads())
        if resume and not settings.checkpoints:
            raise ValueError("--resume and --no-checkpoints exclude each other; give one")
        devices, threads = settings.devices or (), settings.threads or 1
        parsed = _parsed(devices)  # before the data, which may take long to load
        lr_schedule.check_name(settings.lr_schedule)
        named_optimizer.check(settings)
        spec = data.load(settings.data, settings.data_root, download=settings.download)
        torch.set_num_threads(threads)
        torch.manual_seed(settings.seed)
        self.model = find_model(
            settings.model,
            in_channels=spec.in_channels,
            classes=spec.num_classes,
            image_size=spec.image_size,
        )
        if settings.channels_last is None:
            settings = replace(settings, channels_last=is_convolutional(self.model))
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.out = _folder(settings, named, resume, overwrite)
        settings = replace(settings, out=str(self.out))
        self._board = TensorBoard(self.out / TENSORBOARD) if settings.tensorboard else None
        self._train = data.BatchLoader(
            spec.train,
            settings.batch_size,
            shuffle=True,
            seed=settings.seed,
            channels_last=bool(settings.channels_last),
            workers=settings.workers or 0,
            pin_memory=bool(settings.workers) and parsed[0].type == "cuda",
        )
        # Not augmented, and few and large: not worth processes of their own.
        self._test = data.BatchLoader(
            spec.test, TEST_BATCH_SIZE, channels_last=bool(settings.channels_last)
        )
        self.runner = FDGRunner(
            self.model,
            devices,
            method=settings.method,
            split=settings.split,
            capture=settings.capture,
            backward_weights=settings.backward_weights,
            precision=settings.precision,
            cpu_threads=threads if parsed[0].type == "cpu" else None,
            graphs=GRAPHS[settings.graphs],
            **named_optimizer.runner_options(settings, self.model),
        )
        optimizer = self.runner.optimizer
        schedule = lr_schedule.from_settings(optimizer, settings, len(self._train))
        self._rate = lr_schedule.Rate(schedule, optimizer)
        self._metadata = {
            "model": settings.model,
            "data": settings.data,
            "seed": str(settings.seed),
            "version": __version__,
            "in_channels": str(spec.in_channels),
            "num_classes": str(spec.num_classes),
            "image_size": str(spec.image_size),
        }
        self._settings = settings
        self._rows: list[EpochRow] = []
        self._saved_rows = 0
        self._rows_before = 0  # of a run that was gone on with
        self._files: list[str] = []
        self._make_folder()
        self._stage_log = None
        if settings.log_stages is not None:
            self._stage_log = StageLog(self.out / STAGES, settings.log_stages, self._board)
        self._checkpoints = None
        if settings.checkpoints:
            self._checkpoints = Checkpoints(
                self.out / CHECKPOINTS,
                every=settings.checkpoint_every,
                keep=settings.keep,
                resume=resume,
                overwrite=overwrite,
                metric=lambda _: self._rows[-1].test_accuracy or 0.0,
            )

    @property
    def settings(self) -> Settings:
        """The settings with every default filled in, and the split once it is known."""
        split = self.runner.split
        return self._settings if split is None else replace(self._settings, split=tuple(split))

    @property
    def resumable(self) -> bool:
        """Whether there are checkpoints to go on from."""
        return self._checkpoints is not None and _has_checkpoints(self.out)

    def run(self, console: Console) -> Outcome:
        """Train to the end, or until Ctrl-C or a loss that is not finite, and write the files.

        metrics.csv, settings.json and weights.safetensors are written after every epoch,
        curves.png at the end, and what else the settings ask for.

        Raises:
            OSError: a file cannot be written.
            CheckpointError: the checkpoints cannot be gone on from, or written over.
            LoaderWorkerError: a process that makes batches died.
        """
        settings = self._settings
        progress = make_progress(
            console, settings.epochs, len(self._train), lambda: self.runner.shares
        )
        status, message = "finished", ""
        begin = time.perf_counter()
        try:
            with self._tracing(console), progress, self._train:
                self.runner.fit(
                    self._train,
                    settings.epochs,
                    lr_scheduler=self._rate,
                    lr_step=str(settings.lr_step),
                    callbacks=[Reporting(self, progress, self._board, self._stage_log)],
                    checkpoints=self._checkpoints,
                )
        except TrainingStopped as stopped:
            status, message = "stopped", stopped.what  # the command line has its own way to go on
        except KeyboardInterrupt:
            status = "interrupted"
        except NonFiniteLossError as error:
            status, message = "diverged", str(error)
        seconds = time.perf_counter() - begin
        if self._rows_before >= settings.epochs:
            message = f"nothing was left to train: the run in {self.out} has all its epochs"
        # The files of an epoch belong together; half an epoch more has no row in metrics.csv.
        if self._saved_rows < max(1, len(self._rows)):
            self._save()
        draw_curves(self._file("curves.png"), self._rows, self._title())
        for name in (TENSORBOARD if self._board else "", STAGES if self._stage_log else ""):
            if name and (self.out / name).exists():
                self._file(name)
        return Outcome(status, self._rows, seconds, self._files, self.settings, message)

    def untrained(self) -> str:
        """What to say of an exception of :meth:`run` before any batch was trained, when model and data
        may not go together; empty if one was. Folders that were made for nothing are removed."""
        history = self.runner.history
        if (history is not None and history.batch_losses) or self.resumable:
            return ""
        for folder in self._made:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        of = self._metadata
        return (
            f"{of['model']} cannot be trained on the first batch of {of['data']}, with "
            f"{of['in_channels']}x{of['image_size']}x{of['image_size']} images of {of['num_classes']} "
            f"classes (--data chooses)"
        )

    def _make_folder(self) -> None:
        folders = (self.out / CHECKPOINTS, self.out, *self.out.parents)
        self._made = [folder for folder in folders if not folder.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(
                f"--out {self.out} is a file; name a folder, which may exist or not"
            ) from None
        except OSError as error:
            raise ValueError(
                f"--out {self.out} cannot be made: {error.strerror}; name another folder"
            ) from None

    @contextmanager
    def _tracing(self, console: Console) -> Iterator[None]:
        """Within it the ticks that the settings name are recorded."""
        if self._settings.trace is None:
            yield
            return
        skip, ticks = read_window(self._settings.trace)
        path = self.out / TRACE
        timeline: Timeline | None = None
        try:
            with self.runner.trace(path, skip=skip, ticks=ticks) as timeline:
                yield
        finally:
            if timeline is not None and timeline.epochs:
                note = f" ({timeline.note})" if timeline.note else ""
                console.print(
                    f"{timeline.ticks} ticks from {skip} on{note}: {self._file(TRACE)} opens in "
                    f"https://ui.perfetto.dev, {self._file(PICTURE)} is a picture of them"
                )

    def finish_epoch(self, result: EpochResult) -> EpochRow:
        """Test, and write the files; returns the epoch's row."""
        self._rows.append(self._row(result))
        self._save()
        return self._rows[-1]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run: its settings and rows."""
        return {
            "settings": with_effect(self._settings),
            "rows": [asdict(row) for row in self._rows],
        }

    def check_settings(self, theirs: dict[str, Any]) -> None:
        """Whether the settings in what :meth:`state_dict` gave are those of this run.

        Raises:
            CheckpointError: they were others.
        """
        different = differences(with_effect(self._settings), theirs)
        if different:
            longer = " (a schedule follows from the number of epochs)" * ("--epochs" in different)
            raise CheckpointError(
                f"the run had other settings: {different}{longer}. Give the same to go on, or begin "
                f"anew with another --out or --overwrite"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the same settings."""
        self._rows = [EpochRow(**row) for row in state["rows"]]
        self._rows_before = len(self._rows)
        self._saved_rows = len(self._rows)

    def summary(self, outcome: Outcome) -> dict[str, str]:
        """What was trained and how it went, as short texts."""
        settings, rows = outcome.settings, outcome.rows
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        cuts = settings.split
        layers = f" in {len(self.model)} layers" if isinstance(self.model, nn.Sequential) else ""
        lines = {
            "model": f"{settings.model}, {parameters:,} parameters{layers}",
            "data": f"{settings.data}, {len(self._train.dataset):,} training and "
            f"{len(self._test.dataset):,} test images",
            "stages": f"{len(settings.devices or ())} on {','.join(map(str, settings.devices or ()))}",
        }
        if cuts:
            what = "layer" if layers and not settings.capture else "piece"
            lines["stages"] += f", cut at {what} {', '.join(map(str, cuts))}"
            if what == "piece" and self.runner.split_points:
                lines["stages"] += f" ({', '.join(self.runner.split_points)})"
        lines["method"] = settings.method
        if settings.method != "bp":
            lines["method"] += f", beta {settings.beta:g}, {settings.backward_weights} weights"
        lines["optimizer"] = named_optimizer.described(settings)
        if settings.precision != "float32":
            lines["precision"] = settings.precision + _skipped(rows)
        best = best_epoch(rows)
        if best is not None:
            lines["test accuracy"] = (
                f"{percent(rows[-1].test_accuracy)} (best {percent(best.test_accuracy)}, epoch "
                f"{best.epoch})"
            )
            speed = len(self._train.dataset) * len(rows) / sum(row.seconds for row in rows)
            lines["speed"] = f"{speed:,.0f} samples/s in training"
        lines["time"] = f"{outcome.seconds:.1f} s"
        lines["written"] = f"{', '.join(outcome.files)} in {self.out}"
        return lines

    def _row(self, result: EpochResult) -> EpochRow:
        test = self.runner.evaluate(self._test)
        self._rate.tested(test.loss)
        return EpochRow(
            epoch=result.epoch + 1,
            lr=self._rate.latest,
            train_loss=result.loss,
            train_accuracy=result.accuracy,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
            seconds=result.seconds,
            samples_per_second=result.samples / result.seconds,
            data_wait=result.data_wait,
            busy=result.busy,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            updates=None if result.skipped is None else result.updates,
        )

    def _save(self) -> None:
        weights = self.runner.state_dict()
        # An epoch's last update may overflow; the weights of the epoch before are worth more.
        if finite(weights):
            save_weights(self._file("weights.safetensors"), weights, self._metadata)
        write_metrics(self._file("metrics.csv"), self._rows)
        write_settings(self._file(RECORD), self._record())
        self._saved_rows = len(self._rows)

    def _file(self, name: str) -> Path:
        if name not in self._files:
            self._files.append(name)
        return self.out / name

    def _record(self) -> dict[str, Any]:
        return {
            "command": self.settings.command(),
            "settings": asdict(self.settings),
            "epochs_finished": len(self._rows),
            "versions": {
                "fdg_cuda": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }

    def _title(self) -> str:
        settings = self.settings
        stages = len(settings.devices or ())
        return (
            f"{settings.model} on {settings.data}, {settings.method} in {counted(stages, 'stage')}"
        )


def _folder(settings: Settings, named: str | None, resume: bool, overwrite: bool) -> Path:
    """Where the run is kept: in the folder that was ``named``, else in one in which nothing is lost.

    Raises:
        ValueError: in the one that was named something would be.
    """
    folder = Path(str(settings.out))
    if overwrite or (resume and named is not None and _has_checkpoints(folder)):
        return folder
    if named is not None:
        check_folder(folder, settings)
        return folder
    free = free_folder(folder, settings)
    # Without any run to go on with, that of the first folder refuses by name.
    return folder if resume and _has_checkpoints(folder) and not _has_checkpoints(free) else free


def _has_checkpoints(folder: Path) -> bool:
    try:
        return bool(CheckpointFolder(folder / CHECKPOINTS).files())
    except OSError:
        return False


def _parsed(devices: Sequence[int | str]) -> list[torch.device]:
    """As :func:`parse_devices`, in the command line's words."""
    try:
        return parse_devices(devices, lambda would_do: f"--devices {','.join(map(str, would_do))}")
    except ValueError as error:
        number = devices[0]
        # Which may have been meant as a number of stages.
        if len(devices) == 1 and isinstance(number, int) and 2 <= number <= MOST_STAGES_MEANT:
            stages = ",".join(["cpu"] * number)
            raise ValueError(
                f"{error}. devices is a list with one device per stage: for {number} stages such as "
                f"{stages}"
            ) from None
        raise


def _skipped(rows: Sequence[EpochRow]) -> str:
    """What the loss scale did in a whole run."""
    counts = [row.skipped for row in rows if row.skipped is not None]
    if not counts:
        return ""
    total = [sum(of_stage) for of_stage in zip(*counts, strict=True)]
    updates = sum(row.updates or 0 for row in rows)
    return f", {updates_left_out(total, updates)}, loss scale {rows[-1].loss_scale:g}"
