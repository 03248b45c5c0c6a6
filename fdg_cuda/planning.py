"""What training on K stages would be like, for K = 1, 2, ...: before one buys the hardware.

The model's pieces are measured on a device that is here. For every K and every mode the best cut is
found (:mod:`fdg_cuda.cutting`), and the very schedule is replayed with what was measured and with the
time that copies take (:mod:`fdg_cuda.simulation`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.costs import LayerCost
from fdg_cuda.cpu_threads import share_of_cores
from fdg_cuda.cutting import Cut, best_cut
from fdg_cuda.devices import Device, parse_devices
from fdg_cuda.errors import CutMemoryError
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.hardware_file import Hardware, read_hardware
from fdg_cuda.layer_times import anew
from fdg_cuda.machine import Machine
from fdg_cuda.machines import make_machine
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.model_chain import ModelChain
from fdg_cuda.nested import Nested, check_nested, sample_count, tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision, parse_precision
from fdg_cuda.schedule import Schedule
from fdg_cuda.simulation import Simulation, StageTimes, simulate
from fdg_cuda.stage_memory import Holding, stage_memory
from fdg_cuda.staged_model import chain_of
from fdg_cuda.timeline import Timeline
from fdg_cuda.update_time import update_seconds_per_byte

STEADY_TICKS = 24  # simulated behind the fill
WINDOW_TICKS = 12  # of them drawn
EVERY_K = 8  # up to so many stages every K is planned; then their doubles, and the last
AS_GOOD = 1.02  # an earlier mode is taken unless a later one is faster by more
WORTH_A_STAGE = 1.05  # fewer stages are recommended unless more are faster by more, for each


@dataclass(frozen=True)
class StagePlan:
    """One stage of a planned cut.

    Attributes:
        device: its name.
        begins_at: what it begins with, as people know it.
        seconds: its forward, backward and update of one batch.
        busy: share of the time in which it is at work, 0 to 1.
        memory_bytes: with the batches it holds.
        up_bytes, down_bytes: what it sends per batch, to the stages above and below.
    """

    device: str
    begins_at: str
    seconds: float
    busy: float
    memory_bytes: int
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Choice:
    """A cut into ``len(stages)`` stages.

    Attributes:
        mode: the ``backward_weights``.
        split: the layers (or pieces) at which stages 1, 2, ... begin.
        tick_seconds: a batch is trained per tick with ``"fdg"``.
        ddg_seconds: per batch, with ``"ddg"`` and the same cut.
        data_parallel_seconds: per batch, of as many replicas with a batch of this size each.
        data_parallel_fits: whether each device has the memory for the whole model.
        timeline: of some ticks.
    """

    mode: str
    split: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    tick_seconds: float
    ddg_seconds: float
    data_parallel_seconds: float
    data_parallel_fits: bool
    timeline: Timeline


@dataclass(frozen=True)
class Row:
    """The best choice for ``stages`` stages, or why there is none."""

    stages: int
    choice: Choice | None
    why_not: str = ""


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Attributes:
        rows: by the number of stages.
        recommended: the fastest choice whose stages are all worth having; None if nothing fits.
        bp_seconds: of a training step with BP on the first device, all of it, if it had the memory.
        batch_size: samples per batch.
        layers: how many the model was measured as.
    """

    rows: tuple[Row, ...]
    recommended: Choice | None
    bp_seconds: float
    batch_size: int
    layers: int

    def speed_up(self, seconds: float) -> float:
        """Of so many seconds per batch over BP on the first device."""
        return self.bp_seconds / seconds


def plan(
    model: nn.Module | Sequence[nn.Module],
    sample: Nested,
    devices: Sequence[Device] | None = None,
    *,
    target: Nested = None,
    loss_fn: LossFunction | None = None,
    hardware: Hardware | str | os.PathLike[str] | None = None,
    backward_weights: str | None = None,
    precision: str | torch.dtype = "float32",
    on_progress: Callable[[str], object] = lambda what: None,
) -> Plan:
    """Predict what training ``model`` on one, two, ... stages would be like.

    Predicted are steady ticks, in which every stage works on a batch, not the fill and drain of an
    epoch. The model's numbers are left as they are. Layers are measured anew, and what is found takes
    the place of what ``FDGRunner`` remembers of them.

    Args:
        model: any that :class:`~fdg_cuda.FDGRunner` takes.
        sample: the input of a batch of the size that training will have.
        devices: as for ``FDGRunner``; planned are the first of them, the first two, and so on. None: the
            CUDA devices of this machine, or one CPU stage per core.
        target: what ``loss_fn`` takes beside the output. Without target and ``loss_fn`` the mean square
            of the output stands in for the loss.
        loss_fn: default cross-entropy, if there is a target.
        hardware: devices that need not be here, in place of ``devices``; or a file that describes them
            (see :mod:`fdg_cuda.hardware_file`). Layers are measured on CUDA device 0, else the CPU.
        backward_weights: the only mode to plan with; None: the best of all.
        precision: as for ``FDGRunner``.
        on_progress: told what is done next.

    Raises:
        TypeError, ValueError: arguments that cannot work, and what would.
        ModelCaptureError: the model's forward cannot be followed.
        OSError: the file cannot be read.
    """
    check_nested(sample, "the sample")
    places = _places(devices, hardware)
    modes = _modes(backward_weights)
    chain = chain_of(model)
    on_progress("running the model on the sample")
    chain.lay_out(sample)
    batch, loss = _batch(sample, target, loss_fn)
    planner = _Planner(chain, batch, loss, places, parse_precision(precision, chain.model))
    most = min(len(places.devices), len(chain.layers))
    rows = []
    with anew():
        for stages in numbers_of_stages(most):
            on_progress(f"planning {stages} stage{'s' if stages > 1 else ''}")
            rows.append(planner.row(stages, modes))
        bp_seconds = planner.bp_seconds()
    return Plan(
        rows=tuple(rows),
        recommended=_recommended(rows),
        bp_seconds=bp_seconds,
        batch_size=sample_count(sample),
        layers=len(chain.layers),
    )


def numbers_of_stages(most: int) -> list[int]:
    """Those that are planned."""
    numbers = list(range(1, min(most, EVERY_K) + 1))
    while numbers[-1] < most:
        numbers.append(min(2 * numbers[-1], most))
    return numbers


def _recommended(rows: Sequence[Row]) -> Choice | None:
    best: Choice | None = None
    for row in rows:
        choice = row.choice
        if choice is None:
            continue
        if best is None:
            best = choice
            continue
        more = len(choice.stages) - len(best.stages)
        if best.tick_seconds > choice.tick_seconds * WORTH_A_STAGE**more:
            best = choice
    return best


# -- what is planned for --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """Where stages are to be, and where layers are measured.

    Attributes:
        devices: names, for as many stages as there can be.
        here: devices of this machine; all of them, or the one to measure on.
        hardware: what is described in place of them.
    """

    devices: Sequence[str]
    here: Sequence[torch.device]
    hardware: Hardware | None

    @property
    def share_cores(self) -> bool:
        """Whether more stages have less of the processor each."""
        return self.hardware is None and self.here[0].type == "cpu"


def _places(
    devices: Sequence[Device] | None, hardware: Hardware | str | os.PathLike[str] | None
) -> _Places:
    if hardware is None:
        here = parse_devices(_all_devices() if devices is None else devices)
        return _Places([str(device) for device in here], here, None)
    if devices is not None:
        raise ValueError(
            "devices are those of this machine and hardware describes others; give one of them"
        )
    described = hardware if isinstance(hardware, Hardware) else read_hardware(hardware)
    names = [device.name for device in described.devices]
    return _Places(names, parse_devices(_all_devices())[:1], described)


def _all_devices() -> list[Device]:
    if torch.cuda.is_available():
        return list(range(torch.cuda.device_count()))
    return ["cpu"] * share_of_cores(None, 1)


def _modes(only: str | None) -> list[BackwardWeights]:
    known = [mode.value for mode in BackwardWeights]
    if only is not None and only not in known:
        raise ValueError(f"backward_weights must be one of {', '.join(known)}; got {only!r}")
    return [BackwardWeights(mode) for mode in (known if only is None else [only])]


def _batch(
    sample: Nested, target: Nested, loss_fn: LossFunction | None
) -> tuple[Batch, LossFunction]:
    if loss_fn is not None:
        return (sample, target), loss_fn
    return (sample, target), _mean_square if target is None else cross_entropy


def _mean_square(output: Nested, target: Nested) -> Tensor:
    floating = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in floating]).sum()


# -- planning -------------------------------------------------------------------------------------


class _Planner:
    """Measures what it needs, once."""

    def __init__(
        self,
        chain: ModelChain,
        batch: Batch,
        loss: LossFunction,
        places: _Places,
        precision: Precision,
    ) -> None:
        self._chain = chain
        self._batch = batch
        self._loss = loss
        self._places = places
        self._precision = precision
        self._update: dict[int, float] = {}  # [threads] seconds per byte

    def row(self, stages: int, modes: Sequence[BackwardWeights]) -> Row:
        """The best choice for so many stages."""
        best: Choice | None = None
        refused: list[CutMemoryError] = []
        for mode in modes:
            # With one stage all modes are the same.
            if stages == 1 and mode is not modes[0]:
                continue
            try:
                choice = self._choice(stages, mode)
            except CutMemoryError as error:
                refused.append(error)
                continue
            if best is None or best.tick_seconds > AS_GOOD * choice.tick_seconds:
                best = choice
        # That of the mode that needs least.
        why_not = min(refused, key=lambda error: error.shortage_bytes, default=None)
        return Row(stages, best, str(why_not) if best is None else "")

    def bp_seconds(self) -> float:
        """A step with BP on the first device."""
        device = self._devices(1)[0]
        return self._step_seconds(1) / device.speed

    def _choice(self, stages: int, mode: BackwardWeights) -> Choice:
        schedule = Schedule("fdg", stages)
        costs, devices, links = self._costs(stages), self._devices(stages), self._links(stages)
        cut = best_cut(costs, devices, schedule, mode, hops=links)
        bounds = [0, *cut.split, len(costs)]
        parts = [costs[a:b] for a, b in pairwise(bounds)]
        times = [self._times(stages, k, parts, devices[k], links) for k in range(stages)]
        replay = self._simulated("fdg", times, mode)
        return Choice(
            mode=mode.value,
            split=tuple(cut.split),
            stages=tuple(
                self._stage_plan(k, cut, parts, times[k], devices[k], replay) for k in range(stages)
            ),
            tick_seconds=replay.tick_seconds,
            ddg_seconds=self._simulated("ddg", times, mode).tick_seconds,
            data_parallel_seconds=self._data_parallel(stages, devices, links),
            data_parallel_fits=all(
                device.memory_bytes is None or device.memory_bytes >= self._whole_bytes(costs)
                for device in devices
            ),
            timeline=replay.timeline,
        )

    def _stage_plan(
        self,
        k: int,
        cut: Cut,
        parts: Sequence[Sequence[LayerCost]],
        times: StageTimes,
        device: DeviceSpec,
        replay: Simulation,
    ) -> StagePlan:
        begins = [0, *cut.split]
        last = k == len(parts) - 1
        return StagePlan(
            device=device.name,
            begins_at=self._chain.point(begins[k]),
            seconds=cut.stage_seconds[k] + times.update,
            busy=replay.timeline.stages[k].busy,
            memory_bytes=cut.memory[k].total,
            up_bytes=0 if last else parts[k][-1].output_bytes,
            down_bytes=0 if k == 0 else parts[k][0].error_bytes,
        )

    def _times(
        self,
        stages: int,
        k: int,
        parts: Sequence[Sequence[LayerCost]],
        device: DeviceSpec,
        links: Sequence[Link],
    ) -> StageTimes:
        part = parts[k]
        weights = sum(cost.parameter_bytes for cost in part)
        return StageTimes(
            forward=sum(cost.forward for cost in part) / device.speed,
            backward=sum(cost.backward for cost in part) / device.speed,
            update=weights * self._update_seconds_per_byte(stages) / device.speed,
            send_activation=links[k].seconds(part[-1].output_bytes) if k < stages - 1 else 0.0,
            send_error=links[k - 1].seconds(part[0].error_bytes) if k > 0 else 0.0,
        )

    def _simulated(
        self, method: str, times: Sequence[StageTimes], mode: BackwardWeights
    ) -> Simulation:
        schedule = Schedule(method, len(times))
        fill = schedule.latency + max(map(schedule.slots, range(schedule.stages)))
        return simulate(
            schedule,
            times,
            fill + STEADY_TICKS,
            layout="cpu" if self._places.share_cores else "cuda",
            mode=mode.value,
            window=range(fill, fill + WINDOW_TICKS),
        )

    def _data_parallel(
        self, stages: int, devices: Sequence[DeviceSpec], links: Sequence[Link]
    ) -> float:
        """Per batch, if each device had the whole model and the replicas' gradients were averaged by a
        ring while the backward is at work: what of it is longer than the backward shows."""
        costs = self._costs(stages)
        weights = sum(cost.parameter_bytes for cost in costs)
        backward = sum(cost.backward for cost in costs)
        slowest = min(device.speed for device in devices)
        hops = 2 * (stages - 1)
        ring = max((hops * link.seconds(weights / stages) for link in links), default=0.0)
        step = self._step_seconds(stages) / slowest + max(0.0, ring - backward / slowest)
        return step / stages

    @staticmethod
    def _whole_bytes(costs: Sequence[LayerCost]) -> int:
        """Of a replica of the whole model."""
        holding = Holding.of(Schedule("bp", 1), BackwardWeights.STASH, 0)
        return stage_memory(costs, None, holding).total

    def _step_seconds(self, stages: int) -> float:
        """Of the whole model on one of ``stages`` devices, at speed 1."""
        costs = self._costs(stages)
        weights = sum(cost.parameter_bytes for cost in costs)
        seconds = sum(cost.forward + cost.backward for cost in costs)
        return seconds + weights * self._update_seconds_per_byte(stages)

    # -- measured ---------------------------------------------------------------------------------

    def _costs(self, stages: int) -> list[LayerCost]:
        machine = self._machine(stages if self._places.share_cores else 1)
        # Remembered by it.
        return machine.layer_costs(self._chain.layers, self._batch, self._loss)

    def _devices(self, stages: int) -> list[DeviceSpec]:
        if self._places.hardware is not None:
            return list(self._places.hardware.devices[:stages])
        machine = self._machine(stages)
        return machine.device_specs(self._chain.layers, self._batch, self._loss)

    def _links(self, stages: int) -> list[Link]:
        if self._places.hardware is not None:
            return [self._places.hardware.link] * (stages - 1)
        return self._machine(stages).links()

    def _machine(self, stages: int) -> Machine:
        return make_machine(
            self._places.here[:stages],
            Schedule("fdg", stages),
            BackwardWeights.STASH,
            rule=UpdateRule(),
            precision=self._precision,
            cpu_threads=None,
            graphs="auto",
        )

    def _update_seconds_per_byte(self, stages: int) -> float:
        threads = share_of_cores(None, stages if self._places.share_cores else 1)
        if threads not in self._update:
            self._update[threads] = update_seconds_per_byte(self._places.here[0], threads)
        return self._update[threads]
