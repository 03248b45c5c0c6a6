"""Records which ticks of a ``fit`` a trace wants, and writes its files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fdg_cuda._core import Scheduler
from fdg_cuda._core import Span as NativeSpan
from fdg_cuda.checks import whole
from fdg_cuda.files import replacing
from fdg_cuda.schedule import Schedule
from fdg_cuda.timeline import Epoch, Lane, Span, Timeline

logger = logging.getLogger("fdg_cuda")

SKIPPED_BEYOND_FILL = 3  # ticks in which caches and allocators settle


class Recorder:
    """One traced block: told of every tick before it is enqueued, and of every epoch's end.

    Args:
        schedule: the rule of the runner.
        path: of the JSON file, beside which the picture goes; None writes nothing.
        ticks: how many are recorded at most.
        skip: how many are left out before them; None: the fill and a few more.

    Raises:
        TypeError, ValueError: an argument that cannot work.
    """

    def __init__(
        self,
        schedule: Schedule,
        path: str | os.PathLike[str] | None,
        *,
        ticks: int,
        skip: int | None,
    ) -> None:
        self._path = None if path is None else _json_path(path)
        self._begin = (
            schedule.latency + SKIPPED_BEYOND_FILL
            if skip is None
            else whole("skip", skip, 0, "ticks")
        )
        self._end = self._begin + whole("ticks", ticks, 1, "ticks")
        self._ticks = 0  # seen so far
        self._ticks_before = 0  # in epochs before this one
        self._epochs = 0
        self.timeline = Timeline(schedule.method, schedule.stages)

    def __enter__(self) -> Timeline:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        return self.timeline

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.timeline.epochs:
            self.timeline.note = self._why_nothing()
            if error is None:
                logger.warning("nothing was traced, no file is written: %s", self.timeline.note)
            return
        asked = self._end - self._begin
        got = self.timeline.ticks
        self.timeline.note = f"{got} of {asked} ticks: fit ended" if got < asked else ""
        if self._path is not None:
            try:
                self._write(self._path)
            except Exception as trouble:
                if error is None:
                    raise
                logger.warning("the timeline could not be written: %s", trouble)

    # -- called by the pipeline -----------------------------------------------------------------

    def before_tick(self, scheduler: Scheduler, tick: int) -> None:
        """``tick`` of the epoch is about to be enqueued."""
        # One more tick than was asked for: where it begins, the window ends.
        if tick == 0 or self._ticks in (self._begin, self._end + 1):
            scheduler.record_spans(self._begin <= self._ticks <= self._end)
        self._ticks += 1

    def end_epoch(self, scheduler: Scheduler, lanes: Sequence[Lane], *, drained: bool) -> None:
        """Take what was recorded. If the epoch broke off, what has not begun is dropped."""
        taken: list[NativeSpan] = []
        if drained:
            taken = scheduler.take_spans()
        else:
            with suppress(RuntimeError):  # it was closed, which the caller is being told
                scheduler.cancel()
                taken = scheduler.take_spans()
        behind = self._end - self._ticks_before
        spans = [_span(span, self._epochs) for span in taken]
        epoch = Epoch(
            self._epochs,
            [span for span in spans if span.tick < behind],
            [span for span in spans if span.tick >= behind],
        )
        if epoch.spans:
            self.timeline.lanes = list(lanes)
            self.timeline.epochs.append(epoch)
        self._epochs += 1
        self._ticks_before = self._ticks

    # -- files ----------------------------------------------------------------------------------

    def _why_nothing(self) -> str:
        if self._ticks == 0:
            return "no fit ran in the traced block; call fit inside it"
        return (
            f"fit took {self._ticks} ticks in all, and the first {self._begin} are skipped; train "
            f"longer, or give trace a smaller skip"
        )

    def _write(self, path: Path) -> None:
        with replacing(path) as temporary:
            text = json.dumps(self.timeline.to_chrome(), indent=None, separators=(",", ":"))
            temporary.write_text(text.replace('{"ph"', '\n{"ph"') + "\n", encoding="utf-8")
        try:
            from fdg_cuda.timeline_picture import draw
        except ImportError as missing:
            logger.warning(
                "%s is written, its picture is not (%s): pip install matplotlib", path, missing
            )
            return
        draw(path.with_suffix(".png"), self.timeline)


def _span(span: NativeSpan, epoch: int) -> Span:
    return Span(
        code=span.code,
        stage=span.stage,
        stream=span.stream,
        slot=span.slot,
        tick=span.tick,
        batch=span.batch,
        epoch=epoch,
        begin=span.begin_s,
        end=span.end_s,
    )


def _json_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name or None; got {path!r}")
    result = Path(path)
    if result.suffix != ".json":
        raise ValueError(
            f"path must end in .json, such as out/trace.json (a picture is written beside it, in .png); "
            f"got {str(path)!r}"
        )
    if result.is_dir():
        raise ValueError(f"path {str(path)!r} is a folder; give the name of a file in it")
    return result
