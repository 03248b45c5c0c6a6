"""The pipeline on CUDA devices: one thread enqueues everything, and waits only for room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from fdg_cuda._core import Scheduler
from fdg_cuda.accelerator import accelerator
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.cuda_fit import CudaFit
from fdg_cuda.cuda_stage import CudaStage
from fdg_cuda.forms import AnyForm
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.layout import INBOX_HALVES, CudaLayout
from fdg_cuda.loss_scale import BatchScales, LossScale
from fdg_cuda.mail import METRICS, Outbox
from fdg_cuda.nested import sample_count
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.pipeline import MAX_TICKS_IN_FLIGHT, LossFunction, Pipeline
from fdg_cuda.program import Program
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.timeline import Lane


class CudaPipeline(Pipeline):
    """See :class:`Pipeline`.

    Args:
        mode: which weights a backward uses.
        staged: per hop, whether it goes through pinned host memory.
        graphs: ``"auto"``, ``"always"`` or ``"never"``.
        compute_streams: per stage a ``cudaStream_t`` of the caller's to compute on; empty: made here.
        delays: (seed, longest in microseconds) of the device's sleeps before every action, for tests.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[CudaStage],
        loss_fn: LossFunction,
        optimizer: DelayedOptimizer,
        *,
        mode: BackwardWeights,
        staged: Sequence[bool],
        graphs: str,
        interrupts: Interrupts,
        recorder: Recorder | None = None,
        loss_scale: LossScale | None = None,
        delays: tuple[int, int] = (0, 0),
        compute_streams: Sequence[int] = (),
    ) -> None:
        super().__init__(
            schedule,
            stages,
            loss_fn,
            optimizer,
            interrupts=interrupts,
            recorder=recorder,
            loss_scale=loss_scale,
        )
        self._stages = list(stages)
        # Of the first batch's input and target.
        self._regular: tuple[AnyForm, ...] | None = None
        self._samples = np.zeros(self._rows, dtype=np.int64)
        layout = CudaLayout(schedule, mode, staged=staged)
        self._lanes = [Lane(layout.stage_of(i), name) for i, name in enumerate(layout.streams)]
        ordinals = [self._stages[lane.stage].ordinal for lane in self._lanes]
        self._scheduler = Scheduler(
            "cuda",
            layout.streams,
            max_ticks_in_flight=MAX_TICKS_IN_FLIGHT,
            devices=ordinals,
            handles=_handles(layout, compute_streams),
            delay_seed=delays[0],
            max_delay_us=delays[1],
        )
        try:
            self._fit = self._make_fit(ordinals, staged, graphs)
            for stage in self._stages:
                stage.begin_fit(self._fit)
            self._program = Program(schedule, layout, self._scheduler, self._stages)
        except BaseException:
            self.close()
            raise

    def _make_fit(self, ordinals: list[int], staged: Sequence[bool], graphs: str) -> CudaFit:
        results = accelerator().pinned(self._rows * METRICS * 8).view(torch.float64)
        results = results.view(self._rows, METRICS)
        handles = [self._scheduler.stream_handle(index) for index in range(len(ordinals))]
        return CudaFit(
            lanes=list(map(accelerator().lane, ordinals, handles)),
            handles=handles,
            staged=list(staged),
            hyper=self._hyper,
            regular=np.zeros((self._schedule.stages, self._rows), dtype=np.uint8),
            rows=self._rows,
            ticks_in_flight=MAX_TICKS_IN_FLIGHT,
            inputs=Outbox(self._rows),
            targets=Outbox(self._rows),
            results=results,
            result_addresses=np.array([row.data_ptr() for row in results], dtype=np.uint64),
            loss_fn=self._loss_fn,
            graphs=graphs,
        )

    def close(self) -> None:
        super().close()
        # Only a service to others, and on a device that was lost it fails: the error that matters is
        # on its way already.
        with suppress(RuntimeError):
            accelerator().release()

    def _make_scales(self, loss_scale: LossScale) -> BatchScales:
        stages = self._schedule.stages
        finite = accelerator().pinned(self._rows * stages).view(torch.bool).view(-1, stages)
        return BatchScales(
            loss_scale, finite, accumulate=self._schedule.accumulate, asynchronous=True
        )

    def _put(self, number: int, batch: Batch) -> None:
        fit = self._fit
        form_of_input = fit.inputs.put(number, batch[0])
        form_of_target = fit.targets.put(number, batch[1])
        forms = (form_of_input, form_of_target)
        self._regular = forms if self._regular is None else self._regular
        row = number % self._rows
        fit.regular[:, row] = forms == self._regular
        self._samples[row] = sample_count(batch[1])
        half = number % INBOX_HALVES
        self._stages[0].mail.inbox.reserve(half, form_of_input.nbytes)
        self._stages[-1].mail.targets.reserve(half, form_of_target.nbytes)

    def _settle(self) -> None:
        for ordinal in {stage.ordinal for stage in self._stages}:
            accelerator().synchronize(ordinal)

    def _gather(self, done: int) -> None:
        for batch in range(len(self.results), done):
            row = batch % self._rows
            loss, correct = self._fit.results[row].tolist()
            if not math.isfinite(loss) and self._scales is None:
                raise self._non_finite(loss, batch)
            answers = None if math.isnan(correct) else round(correct)
            self.results.append((loss, int(self._samples[row]), answers))


def _handles(layout: CudaLayout, compute_streams: Sequence[int]) -> list[int]:
    """Per stream the handle to adopt, 0 where one is to be made."""
    handles = [0] * len(layout.streams)
    for stage, handle in enumerate(compute_streams):
        handles[layout.compute(stage)] = handle
    return handles
