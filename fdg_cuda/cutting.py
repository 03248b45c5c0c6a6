"""Where to cut a chain of layers into stages: the best of all cuts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.costs import LayerCost
from fdg_cuda.cut_search import Search
from fdg_cuda.errors import CutMemoryError
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.names import counted
from fdg_cuda.schedule import Schedule
from fdg_cuda.stage_memory import SGD_STATE, Holding, StageMemory, stage_memory


@dataclass(frozen=True)
class Cut:
    """A cut, and what each stage will do.

    Attributes:
        split: layers with which stages 1, 2, ... begin.
        stage_seconds: per stage, of its forward, backward and update for one batch.
        hop_seconds: per stage, in which its send stream is busy with one batch: its activations on
            their way up and its error signals on their way down.
        memory: per stage.
        round_trip_seconds: of a tick, that a batch's way from the stage before the last to the last and
            back leaves room for; 0 where nothing waits for it, or takes time on the way.
    """

    split: list[int]
    stage_seconds: list[float]
    hop_seconds: list[float]
    memory: list[StageMemory]
    round_trip_seconds: float = 0.0

    @property
    def longest(self) -> float:
        """Seconds of a tick: of the stage, the send stream or the round trip that takes longest."""
        return max(*self.stage_seconds, *self.hop_seconds, self.round_trip_seconds)


def best_cut(
    costs: Sequence[LayerCost],
    devices: Sequence[DeviceSpec],
    schedule: Schedule,
    mode: BackwardWeights,
    *,
    hops: Sequence[Link] | None = None,
    state: int = SGD_STATE,
    update_seconds_per_byte: float = 0.0,
    allowed: Collection[int] | None = None,
) -> Cut:
    """The cut into ``schedule.stages`` contiguous stages whose longest time is as short as possible,
    of those that fit into the devices' memories. Exact; of equal cuts the one that cuts earliest, and
    where stages share a device whose memory is short, the one that needs least.

    A stage's time is that of its forward, backward and update, or of its send stream if that is longer.
    In ``"fdg"`` a batch comes back to the stage before the last two ticks after it was forwarded there,
    so that two ticks take no less than that round trip, which counts too. Left out are round trips
    through more stages, which matter only where hops take longer than stages, and in ``"ddg"`` the chain
    of forwards within a tick.

    In ``"bp"``, where stages take turns, the longest stage says less; it is cut the same way.

    Args:
        costs: of the layers, in order.
        devices: one per stage. Where stages that are no neighbours share one, each run of neighbours
            has a part of its memory, in proportion to its stages.
        mode: stages that run forwards again take their time too.
        hops: one per pair of neighbours; None: nothing takes time on its way.
        state: how many times the parameters' bytes an optimizer remembers.
        update_seconds_per_byte: of parameters, on a device of speed 1.
        allowed: layers with which stages but the first may begin; None: all.

    Raises:
        CutMemoryError: no cut fits.
        ValueError: fewer layers than stages, or cuts between them that are allowed; or not one device
            per stage and one hop between two.
    """
    stages = schedule.stages
    links = [Link()] * (stages - 1) if hops is None else list(hops)
    if len(costs) < stages:
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages")
    places = frozenset(range(1, len(costs)) if allowed is None else allowed)
    if len(places) < stages - 1:
        raise ValueError(
            f"{len(costs)} layers cannot be cut into {stages} stages, since cuts are possible only "
            f"before the layers {sorted(places)}: others lie between layers that share a parameter or "
            f"buffer. Give at most {len(places) + 1} devices, or untie what is shared."
        )
    if len(devices) != stages or len(links) != stages - 1:
        raise ValueError(
            f"{stages} stages need {stages} devices and {stages - 1} hops between them; got "
            f"{len(devices)} and {len(links)}"
        )

    problem = _Problem(costs, devices, schedule, links, state, update_seconds_per_byte, places)
    search = problem.search(mode)
    split = search.best()
    if split is None:
        raise problem.lack(mode)
    return Cut(
        split,
        search.stage_seconds(split),
        search.send_seconds(split),
        problem.memory(split, mode),
        search.round_trip_seconds(split),
    )


@dataclass(frozen=True)
class _Problem:
    """What is asked, but for the mode."""

    costs: Sequence[LayerCost]
    devices: Sequence[DeviceSpec]
    schedule: Schedule
    links: Sequence[Link]
    state: int
    update_seconds_per_byte: float
    allowed: frozenset[int]

    def holdings(self, mode: BackwardWeights) -> list[Holding]:
        stages = range(self.schedule.stages)
        return [Holding.of(self.schedule, mode, k, state=self.state) for k in stages]

    def search(self, mode: BackwardWeights) -> Search:
        return Search(
            self.costs,
            self.holdings(mode),
            self.devices,
            self.links,
            self.allowed,
            update_seconds_per_byte=self.update_seconds_per_byte,
            round_trip=self.schedule.method == "fdg",
        )

    def memory(self, split: list[int], mode: BackwardWeights) -> list[StageMemory]:
        ends = [*split, len(self.costs)]
        return [
            stage_memory(self.costs[i:j], self.costs[j] if j < len(self.costs) else None, holding)
            for i, j, holding in zip([0, *split], ends, self.holdings(mode), strict=True)
        ]

    def lack(self, mode: BackwardWeights) -> CutMemoryError:
        """That no cut fits, with what is lacking in the one that lacks least."""
        search = self.search(mode)
        split = search.least_short()
        shortage, run = search.shortage(split)
        needed = [self.memory(split, mode)[k] for k in run.stages]
        total = sum(each.total for each in needed)
        batches = sum(each.activations + each.hops for each in needed)
        fitting = [
            other
            for other in BackwardWeights
            if other is not mode and self.search(other).least_memory() is not None
        ]
        names = [f"backward_weights={other.value!r}" for other in fitting]
        ways = f"{' or '.join(names)} would fit, or try" if names else "Try"
        return CutMemoryError(
            f"no cut of these {len(self.costs)} layers into "
            f"{counted(self.schedule.stages, 'stage')} fits into "
            f"memory with backward_weights={mode.value!r}. In the one that lacks least, split={split}, "
            f"{run.title} on {run.device} would need {_said(total)} ({_said(batches)} for batches in "
            f"flight, {_said(total - batches)} for weights and what belongs to them), {_said(shortage)} "
            f"more than there is. {ways} smaller batches, more stages or larger devices; a split of "
            f"your own (split=[...]) is not held against memory.",
            stages=run.stages,
            shortage_bytes=math.ceil(shortage),
            fitting_modes=fitting,
        )


def _said(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
