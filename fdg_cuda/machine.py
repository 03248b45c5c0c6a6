"""What a runner needs of the kind of device its stages are on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.cpu_pipeline import CpuPipeline, torch_threads
from fdg_cuda.cpu_stage import CpuStage
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.layer_times import remembered
from fdg_cuda.optim import DelayedSGD
from fdg_cuda.pipeline import LossFunction, Pipeline
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.split import measure
from fdg_cuda.stage import Stage


class Machine(ABC):
    """The devices of a runner.

    Args:
        schedule: the rule.
        mode: which weights a backward uses.
    """

    def __init__(self, schedule: Schedule, mode: BackwardWeights) -> None:
        self.schedule = schedule
        self.mode = mode

    @abstractmethod
    def make_stages(self, parts: Sequence[Sequence[nn.Module]]) -> Sequence[Stage]:
        """One stage per device, each with its part of the chain, and wired to its neighbours."""

    @abstractmethod
    def pipeline(
        self,
        loss_fn: LossFunction,
        optimizer: DelayedSGD,
        interrupts: Interrupts,
        recorder: Recorder | None,
    ) -> Pipeline:
        """What runs one ``fit`` of the stages made last."""

    @abstractmethod
    def layer_times(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[float]:
        """Seconds each layer takes for forward plus backward on one of the devices."""

    @abstractmethod
    def forward(self, model: nn.Sequential, x: Tensor) -> Tensor:
        """``model``'s output for ``x``, wherever its layers are."""


class CpuMachine(Machine):
    """Stages that share one processor.

    Args:
        cpu_threads: cores the stages share; None: ``torch.get_num_threads()``.
    """

    def __init__(
        self, schedule: Schedule, mode: BackwardWeights, *, cpu_threads: int | None
    ) -> None:
        super().__init__(schedule, mode)
        self._cpu_threads = cpu_threads
        self._stages: list[CpuStage] = []
        # For tests: (seed, longest delay in microseconds) put before every action.
        self.injected_delays = (0, 0)

    def make_stages(self, parts: Sequence[Sequence[nn.Module]]) -> Sequence[Stage]:
        self._stages = [
            CpuStage(k, part, self.schedule.slots(k), mode=self.mode, alone=len(parts) == 1)
            for k, part in enumerate(parts)
        ]
        for lower, upper in zip(self._stages, self._stages[1:], strict=False):
            lower.above, upper.below = upper, lower
        return self._stages

    def pipeline(
        self,
        loss_fn: LossFunction,
        optimizer: DelayedSGD,
        interrupts: Interrupts,
        recorder: Recorder | None,
    ) -> Pipeline:
        return CpuPipeline(
            self.schedule,
            self._stages,
            loss_fn,
            optimizer,
            threads=self._threads_per_stage(),
            mode=self.mode,
            interrupts=interrupts,
            recorder=recorder,
            delays=self.injected_delays,
        )

    def layer_times(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[float]:
        threads = self._threads_per_stage()
        return remembered(
            layers, batch, threads, lambda: measure(layers, batch, loss_fn, threads=threads)
        )

    def forward(self, model: nn.Sequential, x: Tensor) -> Tensor:
        output: Tensor = model(x)
        return output

    def _threads_per_stage(self) -> int:
        with torch_threads:
            cores = self._cpu_threads or torch.get_num_threads()
        return cores if self.schedule.method == "bp" else max(1, cores // self.schedule.stages)
