"""The best choice for a number of stages: measured, cut and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batch
from fdg_cuda.company import slowdown_in_company
from fdg_cuda.costs import LayerCost
from fdg_cuda.cpu_threads import share_of_cores
from fdg_cuda.cutting import Cut, best_cut
from fdg_cuda.errors import CutMemoryError
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.machine import Machine
from fdg_cuda.machines import make_machine
from fdg_cuda.model_chain import ModelChain
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.plan_places import Places
from fdg_cuda.plans import Choice, Row, StagePlan
from fdg_cuda.precision import Precision
from fdg_cuda.schedule import Schedule
from fdg_cuda.simulation import Simulation, StageTimes, simulate
from fdg_cuda.stage_memory import Holding, stage_memory
from fdg_cuda.update_time import update_seconds_per_byte

STEADY_TICKS = 24  # simulated behind the fill
WINDOW_TICKS = 12  # of them drawn
EVERY_K = 8  # up to so many stages every K is planned; then their doubles, and the last
PATIENCE = 2.0  # a plan is to be true; for a cut layers need only be true to each other
AS_GOOD = 1.02  # an earlier mode is taken unless a later one is faster by more


def numbers_of_stages(most: int) -> list[int]:
    """Those that are planned."""
    numbers = list(range(1, min(most, EVERY_K) + 1))
    while numbers[-1] < most:
        numbers.append(min(2 * numbers[-1], most))
    return numbers


class Planner:
    """Measures what it needs, once.

    Attributes:
        note: what could not be measured as it should have been; else empty.
    """

    def __init__(
        self,
        chain: ModelChain,
        batch: Batch,
        loss: LossFunction,
        places: Places,
        precision: Precision,
    ) -> None:
        self._chain = chain
        self._batch = batch
        self._loss = loss
        self._places = places
        self._precision = precision
        self.note = ""
        self._slowdowns: dict[int, float] = {}

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

    def bp_seconds(self, most: int) -> float:
        """A step with BP on the first device; of a processor that ``most`` stages would share, with as
        many of its cores as serve it best."""
        numbers = numbers_of_stages(most) if self._places.share_cores else [1]
        return min(map(self._step_seconds, numbers)) / self._devices(1)[0].speed

    def _choice(self, stages: int, mode: BackwardWeights) -> Choice:
        costs, devices, links = self._costs(stages), self._devices(stages), self._links(stages)
        cut = self._best_cut(stages, devices, mode)
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
                device.memory_bytes is None or device.memory_bytes >= self._replica_bytes(costs)
                for device in devices
            ),
            timeline=replay.timeline,
        )

    def _best_cut(self, stages: int, devices: Sequence[DeviceSpec], mode: BackwardWeights) -> Cut:
        return best_cut(
            self._costs(stages),
            devices,
            Schedule("fdg", stages),
            mode,
            hops=self._links(stages),
            update_seconds_per_byte=self._update_seconds_per_byte(stages),
            allowed=self._chain.allowed_cuts(),
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
            seconds=cut.stage_seconds[k],
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
    def _replica_bytes(costs: Sequence[LayerCost]) -> int:
        """Of the whole model under data parallelism, which needs no snapshot, and no more gradients than
        there are weights."""
        holding = Holding.of(Schedule("bp", 1), BackwardWeights.STASH, 0)
        whole = stage_memory(costs, None, holding)
        return whole.total - whole.snapshot - whole.gradients + whole.weights

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
        costs = machine.layer_costs(self._chain.layers, self._batch, self._loss)
        self.note = self.note or machine.measured_elsewhere
        return costs

    def _devices(self, stages: int) -> list[DeviceSpec]:
        if self._places.hardware is not None:
            return list(self._places.hardware.devices[:stages])
        if self._places.share_cores:
            # More stages than cores take turns on them.
            at_once = min(stages, share_of_cores(None, 1))
            speed = at_once / stages / self._slowdown(at_once)
            return [DeviceSpec("cpu", speed=speed)] * stages
        machine = self._machine(stages)
        return machine.device_specs(self._chain.layers, self._batch, self._loss)

    def _slowdown(self, stages: int) -> float:
        """Of so many stages on cores of their own, since the others are at work too."""
        if stages not in self._slowdowns:
            cut = self._best_cut(stages, [DeviceSpec("cpu")] * stages, BackwardWeights.STASH)
            layers = self._chain.layers
            self._slowdowns[stages] = slowdown_in_company(
                [layers[a:b] for a, b in pairwise([0, *cut.split, len(layers)])],
                self._batch,
                self._loss,
                threads=share_of_cores(None, stages),
                precision=self._precision,
            )
        return self._slowdowns[stages]

    def _links(self, stages: int) -> list[Link]:
        if self._places.hardware is not None:
            return [self._places.hardware.link] * (stages - 1)
        return self._machine(stages).links()

    def _machine(self, stages: int) -> Machine:
        machine = make_machine(
            self._places.here[:stages],
            Schedule("fdg", stages),
            BackwardWeights.STASH,
            rule=UpdateRule(),
            precision=self._precision,
            cpu_threads=None,
            graphs="auto",
        )
        machine.patience = PATIENCE
        return machine

    def _update_seconds_per_byte(self, stages: int) -> float:
        threads = share_of_cores(None, stages if self._places.share_cores else 1)
        return update_seconds_per_byte(self._places.here[0], threads)
