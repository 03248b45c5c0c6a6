"""Stages on CUDA devices."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise

import torch
from torch import nn

from fdg_cuda import _core
from fdg_cuda.accelerator import accelerator
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.costs import LayerCost, measure
from fdg_cuda.cuda_inference import run_stages
from fdg_cuda.cuda_pipeline import CudaPipeline
from fdg_cuda.cuda_stage import CudaStage
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.inference import Finish, one_by_one
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.layer_times import remembered
from fdg_cuda.layout import replaying
from fdg_cuda.loss_scale import LossScale
from fdg_cuda.machine import Machine
from fdg_cuda.model_chain import ModelChain
from fdg_cuda.nested import Nested, moved
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.pipeline import LossFunction, Pipeline
from fdg_cuda.precision import Precision
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.stage import Stage
from fdg_cuda.stage_memory import SPARE
from fdg_cuda.update_time import update_seconds_per_byte

logger = logging.getLogger("fdg_cuda")

REPLAY_IS_EAGER = (
    "backward_weights='replay' runs forwards again in the backward, with buffers and random numbers put "
    "back on the host, which a graph cannot hold"
)
# What is known of hops before any was measured: less than PCIe 4.0 x16 does. NVLink is many times
# as fast; where hops do not limit, it does not matter. Through the host both copies go on at the same
# time, but share its memory.
PEER = Link(20e9, 10e-6)
STAGED = Link(10e9, 20e-6)
SAME_DEVICE = Link(500e9, 5e-6)
GRAPHS = {"auto": "auto", True: "always", False: "never"}


@cache
def peers_reach_each_other(one: int, other: int) -> bool:
    """Whether two devices can copy into each other's memory, proved once per pair and process."""
    return _core.cuda_peer_copies_work(one, other) and _core.cuda_peer_copies_work(other, one)


class CudaMachine(Machine):
    """One stage per entry of ``ordinals``; several may name the same device.

    Args:
        graphs: ``"auto"``, True or False.

    Raises:
        ValueError: ``graphs`` is True, but a stage runs forwards again.
    """

    def __init__(
        self,
        schedule: Schedule,
        mode: BackwardWeights,
        ordinals: Sequence[int],
        *,
        rule: UpdateRule,
        precision: Precision,
        graphs: str | bool,
    ) -> None:
        super().__init__(schedule, mode, rule=rule, precision=precision)
        self._ordinals = list(ordinals)
        if graphs == "auto" and rule.needs_python:
            logger.info("stages run eagerly, not as captured graphs: %s", rule.needs_python)
            graphs = False
        self._graphs = GRAPHS[graphs]
        self._check_graphs()
        self._stages: list[CudaStage] = []
        # For tests: see CudaPipeline; and hops that are staged although devices reach each other.
        self.injected_delays = (0, 0)
        self.stage_every_hop = False
        # Per stage a cudaStream_t to compute on (of a green context, say), which must outlive every
        # fit; empty: streams are made.
        self.compute_streams: list[int] = []

    def _check_graphs(self) -> None:
        eager = sorted(replaying(self.schedule, self.mode))
        if not eager or self._graphs == "never":
            return
        if self._graphs == "always":
            raise ValueError(
                f"graphs=True, but {REPLAY_IS_EAGER}. graphs='auto' captures the others, which keep "
                f"their activations; backward_weights='current' has as few weight copies and can be "
                f"captured."
            )
        logger.info("stages 0 to %d run eagerly: %s", eager[-1], REPLAY_IS_EAGER)

    def make_stages(self, parts: Sequence[Sequence[nn.Module]]) -> Sequence[Stage]:
        self._stages = [
            CudaStage(
                k,
                part,
                self.schedule.slots(k),
                mode=self.mode,
                rule=self.rule,
                precision=self.precision,
                ordinal=ordinal,
            )
            for k, (part, ordinal) in enumerate(zip(parts, self._ordinals, strict=True))
        ]
        for lower, upper in pairwise(self._stages):
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
        return CudaPipeline(
            self.schedule,
            self._stages,
            loss_fn,
            optimizer,
            mode=self.mode,
            staged=[self._is_staged(*hop) for hop in pairwise(self._ordinals)],
            graphs=self._graphs,
            interrupts=interrupts,
            recorder=recorder,
            loss_scale=loss_scale,
            delays=self.injected_delays,
            compute_streams=self.compute_streams,
        )

    def _is_staged(self, lower: int, upper: int) -> bool:
        if self.stage_every_hop:
            return True
        if peers_reach_each_other(lower, upper):
            return False
        logger.info(
            "CUDA devices %d and %d cannot reach each other's memory: what goes between them passes "
            "through the host's",
            lower,
            upper,
        )
        return True

    def layer_costs(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[LayerCost]:
        ordinal = self._ordinals[0]
        try:
            return self._costs_on(ordinal, layers, batch, loss_fn)
        except torch.OutOfMemoryError:
            logger.warning(
                "the whole model does not fit on CUDA device %d, so its layers are measured on "
                "the CPU; give split=[...] if the cut turns out unbalanced",
                ordinal,
            )
        self.measured_elsewhere = (
            f"layers were measured on the CPU, since the whole model does not fit on CUDA device "
            f"{ordinal}: seconds are the CPU's, and hops and updates weigh too little beside them"
        )
        accelerator().release()
        for layer in layers:
            layer.to("cpu")
        host = torch.device("cpu")
        cpu = (moved(batch[0], host), moved(batch[1], host))
        threads = torch.get_num_threads()

        def measured() -> list[LayerCost]:
            return measure(
                layers,
                cpu,
                loss_fn,
                threads=threads,
                precision=self.precision,
                patience=self.patience,
            )

        return remembered(layers, cpu, loss_fn, threads, measured, precision=self.precision)

    def _costs_on(
        self, ordinal: int, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[LayerCost]:
        """Raises:
        OutOfMemoryError: the whole chain does not fit there.
        """
        device = accelerator().device(ordinal)

        def measured() -> list[LayerCost]:
            for layer in layers:
                layer.to(device)
            return measure(
                layers,
                (moved(batch[0], device), moved(batch[1], device)),
                loss_fn,
                threads=torch.get_num_threads(),
                precision=self.precision,
                synchronize=lambda: accelerator().synchronize(ordinal),
                random_devices=[ordinal] if device.type == "cuda" else [],
                patience=self.patience,
            )

        name = accelerator().name(ordinal)
        return remembered(
            layers, batch, loss_fn, 1, measured, device=name, precision=self.precision
        )

    def update_seconds_per_byte(self) -> float:
        return update_seconds_per_byte(
            accelerator().device(self._ordinals[0]), torch.get_num_threads()
        )

    def device_specs(
        self, layers: Sequence[nn.Module], batch: Batch, loss_fn: LossFunction
    ) -> list[DeviceSpec]:
        # One measurement per kind of device.
        kinds = {accelerator().name(ordinal): ordinal for ordinal in reversed(self._ordinals)}
        seconds = dict.fromkeys(kinds, 1.0)
        if len(kinds) > 1:
            try:
                for name, ordinal in kinds.items():
                    costs = self._costs_on(ordinal, layers, batch, loss_fn)
                    seconds[name] = sum(cost.forward + cost.backward for cost in costs)
            except torch.OutOfMemoryError:
                accelerator().release()
                seconds = dict.fromkeys(kinds, 1.0)
                logger.warning(
                    "the whole model does not fit on every kind of CUDA device (%s), so the cut takes "
                    "them to be equally fast; give split=[...] if it turns out unbalanced",
                    ", ".join(kinds),
                )
        first = seconds[accelerator().name(self._ordinals[0])]
        return [
            DeviceSpec(
                f"CUDA device {ordinal}",
                int(accelerator().memory(ordinal) * (1 - SPARE)),
                speed=first / seconds[accelerator().name(ordinal)],
            )
            for ordinal in self._ordinals
        ]

    def links(self) -> list[Link]:
        return [self._link(*hop) for hop in pairwise(self._ordinals)]

    def _link(self, lower: int, upper: int) -> Link:
        if self.stage_every_hop or not peers_reach_each_other(lower, upper):
            return STAGED
        return SAME_DEVICE if lower == upper else PEER

    def forward(self, chain: ModelChain, x: Nested) -> Nested:
        if not self._stages:
            # On the CPU, or where its layers were measured.
            device = next(chain.model.parameters()).device
            with self.precision.autocast(device.type):
                return chain.forward(moved(x, device))
        for stage in self._stages:
            x = moved(x, stage.device)
            with stage.precision.autocast(stage.device.type):
                for layer in stage.layers:
                    x = layer(x)
        return x

    def inference(
        self, chain: ModelChain, batches: Iterator[Batch], finish: Finish, *, to_host: bool
    ) -> Generator[Nested, None, None]:
        if self._stages:
            return run_stages(self._stages, batches, finish, to_host=to_host)
        return one_by_one(partial(self.forward, chain), batches, finish, to_host=to_host)
