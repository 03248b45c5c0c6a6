"""What a runner needs of the kind of device its stages are on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import nn

from fdg_cuda.at_work import measured_at_work
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.costs import LayerCost, measure
from fdg_cuda.cpu_inference import CpuInference
from fdg_cuda.cpu_pipeline import CpuPipeline
from fdg_cuda.cpu_stage import CpuStage
from fdg_cuda.cpu_threads import share_of_cores
from fdg_cuda.cutting import Cut, best_cut
from fdg_cuda.freed_memory import KeptMemory
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.inference import Finish, one_by_one
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.layer_times import remembered
from fdg_cuda.loss_scale import LossScale
from fdg_cuda.model_chain import ModelChain
from fdg_cuda.nested import Nested
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.pipeline import LossFunction, Pipeline
from fdg_cuda.precision import Precision
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.stage import Stage
from fdg_cuda.stage_memory import ADAM_STATE, SGD_STATE
from fdg_cuda.update_time import update_seconds_per_byte


class Machine(ABC):
    """The devices of a runner.

    Args:
        schedule: the rule.
        mode: which weights a backward uses.
        rule: how stages come from gradients to an update.
        precision: in which forwards and losses compute.
    """

    def __init__(
        self,
        schedule: Schedule,
        mode: BackwardWeights,
        *,
        rule: UpdateRule,
        precision: Precision,
    ) -> None:
        self.schedule = schedule
        self.mode = mode
        self.rule = rule
        self.precision = precision
        # What to say if `layer_costs` had to measure on another device than the stages'.
        self.measured_elsewhere = ""
        # With how much patience `layer_costs` measures.
        self.patience = 1.0

    @abstractmethod
    def make_stages(self, parts: Sequence[Sequence[nn.Module]]) -> Sequence[Stage]:
        """One stage per device, each with its part of the chain, and wired to its neighbours."""

    @abstractmethod
    def pipeline(
        self,
        loss_fn: LossFunction,
        optimizer: DelayedOptimizer,
        interrupts: Interrupts,
        recorder: Recorder | None,
        loss_scale: LossScale | None = None,
    ) -> Pipeline:
        """What runs one ``fit`` of the stages made last."""

    @abstractmethod
    def layer_costs(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[LayerCost]:
        """What each layer costs on one of the devices."""

    @abstractmethod
    def update_seconds_per_byte(self) -> float:
        """Of parameters, on the device of :meth:`layer_costs`."""

    @abstractmethod
    def device_specs(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[DeviceSpec]:
        """The devices of the stages, as fast as they are beside the one of :meth:`layer_costs`."""

    @abstractmethod
    def links(self) -> list[Link]:
        """The ways between neighbouring stages."""

    def best_cut(self, chain: ModelChain, batch: Batch, loss_fn: LossFunction) -> Cut:
        """Where to cut ``chain``, by what its layers cost on ``batch``.

        Raises:
            CutMemoryError: no cut fits into the devices' memories.
            ValueError: fewer layers, or cuts that can be made, than stages need.
        """
        return best_cut(
            self.layer_costs(chain.layers, batch, loss_fn),
            self.device_specs(chain.layers, batch, loss_fn),
            self.schedule,
            self.mode,
            hops=self.links(),
            # What another optimizer remembers is not known before its first update; that of few is more.
            state=SGD_STATE if self.rule.optimizer is None else ADAM_STATE,
            update_seconds_per_byte=self.update_seconds_per_byte(),
            allowed=chain.allowed_cuts(),
        )

    @abstractmethod
    def forward(self, chain: ModelChain, x: Nested) -> Nested:
        """The model's output for ``x``, wherever its layers are; stage by stage if there are stages."""

    @abstractmethod
    def inference(
        self, chain: ModelChain, batches: Iterator[Batch], finish: Finish, *, to_host: bool
    ) -> Generator[Nested, None, None]:
        """What ``finish`` makes of the model's output and the target of each batch, in order.

        Reads a bounded number of batches ahead. The results do not depend on timing. If the first batch
        draws random numbers, all are drawn as by a plain pass batch after batch. Closed (as a generator
        is) before its end, it leaves nothing running.

        Args:
            chain: what the stages were made of, in evaluation mode.
            to_host: whether results come to the host; else to where their inputs are.
        """


class CpuMachine(Machine):
    """Stages that share one processor.

    Args:
        cpu_threads: cores the stages share; None: ``torch.get_num_threads()``.
    """

    def __init__(
        self,
        schedule: Schedule,
        mode: BackwardWeights,
        *,
        rule: UpdateRule,
        precision: Precision,
        cpu_threads: int | None,
    ) -> None:
        super().__init__(schedule, mode, rule=rule, precision=precision)
        self._cpu_threads = cpu_threads
        self._stages: list[CpuStage] = []
        # For tests: (seed, longest delay in microseconds) put before every action.
        self.injected_delays = (0, 0)

    def make_stages(self, parts: Sequence[Sequence[nn.Module]]) -> Sequence[Stage]:
        self._stages = [
            CpuStage(
                k,
                part,
                self.schedule.slots(k),
                mode=self.mode,
                rule=self.rule,
                precision=self.precision,
                alone=len(parts) == 1,
            )
            for k, part in enumerate(parts)
        ]
        for lower, upper in zip(self._stages, self._stages[1:], strict=False):
            lower.above, upper.below = upper, lower
        return self._stages

    def pipeline(
        self,
        loss_fn: LossFunction,
        optimizer: DelayedOptimizer,
        interrupts: Interrupts,
        recorder: Recorder | None,
        loss_scale: LossScale | None = None,
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
            loss_scale=loss_scale,
            delays=self.injected_delays,
        )

    def layer_costs(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[LayerCost]:
        threads = self._threads_per_stage()

        def measured() -> list[LayerCost]:
            return measured_at_work(
                lambda stopped: measure(
                    layers,
                    batch,
                    loss_fn,
                    threads=threads,
                    precision=self.precision,
                    patience=self.patience,
                    stopped=stopped,
                ),
            )

        return remembered(layers, batch, loss_fn, threads, measured, precision=self.precision)

    def update_seconds_per_byte(self) -> float:
        return update_seconds_per_byte(torch.device("cpu"), self._threads_per_stage())

    def device_specs(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[DeviceSpec]:
        # No limit: what does not fit into the host's memory was no matter of stages before either.
        return [DeviceSpec("cpu")] * self.schedule.stages

    def links(self) -> list[Link]:
        return [Link()] * (self.schedule.stages - 1)  # by reference

    def forward(self, chain: ModelChain, x: Nested) -> Nested:
        with self.precision.autocast("cpu"):
            if not self._stages:
                return chain.forward(x)
            for stage in self._stages:
                for layer in stage.layers:
                    x = layer(x)
        return x

    def inference(
        self, chain: ModelChain, batches: Iterator[Batch], finish: Finish, *, to_host: bool
    ) -> Generator[Nested, None, None]:
        with KeptMemory():
            yield from self._inference(chain, batches, finish, to_host=to_host)

    def _inference(
        self, chain: ModelChain, batches: Iterator[Batch], finish: Finish, *, to_host: bool
    ) -> Generator[Nested, None, None]:
        plainly = partial(one_by_one, partial(self.forward, chain), finish=finish, to_host=to_host)
        # In "bp" one stage at a time is at work, with all cores: nothing else is done here.
        if len(self._stages) < 2 or self.schedule.method == "bp" or _caller_has_settings():
            yield from plainly(batches)
            return
        # The first batch finds out whether the model draws random numbers: stages would draw others
        # than a plain pass.
        first = next(batches, None)
        if first is None:
            return
        before = torch.get_rng_state()
        results = list(plainly(iter([first])))
        draws = not torch.equal(torch.get_rng_state(), before)
        yield from results
        if draws:
            yield from plainly(batches, first=1)
            return
        inference = CpuInference(
            [stage.layers for stage in self._stages],
            finish,
            precision=self.precision,
            threads=self._threads_per_stage(),
            first=1,
            delays=self.injected_delays,
        )
        with closing(inference):
            yield from inference.run(batches)

    def _threads_per_stage(self) -> int:
        at_once = 1 if self.schedule.method == "bp" else self.schedule.stages
        return share_of_cores(self._cpu_threads, at_once)


def _caller_has_settings() -> bool:
    """Whether the caller is inside of a context manager that torch keeps per thread, so that stages'
    threads would not see it: ``torch.autocast``, ``torch.device``, flop counters and the like."""
    modes: int = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch.is_autocast_enabled("cpu")
