"""A schedule made executable: its steps, given to the C++ scheduler tick by tick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from typing import Protocol

from fdg_cuda._core import Scheduler, Work
from fdg_cuda.layout import INBOX_HALVES, Layout, Step
from fdg_cuda.schedule import Action


class Rule(Protocol):
    """What a program needs of a schedule; see :class:`~fdg_cuda.schedule.Schedule`."""

    @property
    def stages(self) -> int: ...
    @property
    def period(self) -> int: ...
    @property
    def latency(self) -> int: ...
    def slots(self, stage: int) -> int: ...
    def tick(self, tick: int, batches: int | None = None) -> list[Action]: ...


class StageWorks(Protocol):
    """What a stage does for each kind of step; ``None`` stands for nothing at all."""

    def work(self, step: Step) -> Callable[[int], None] | Work | None:
        """The work of ``step``, to be called with the batch's number within the epoch."""


class NoWork:
    """A stage that does nothing: for checking a schedule, and for timing the scheduler itself."""

    def work(self, step: Step) -> None:
        return None


class Program:
    """Feeds the ticks of a schedule to a scheduler, registering steps as they first occur.

    Args:
        schedule: the rule.
        layout: what each of its actions consists of.
        scheduler: with the layout's streams.
        stages: one per stage.
    """

    def __init__(
        self,
        schedule: Rule,
        layout: Layout,
        scheduler: Scheduler,
        stages: Sequence[StageWorks],
    ) -> None:
        self._schedule = schedule
        self._layout = layout
        self._scheduler = scheduler
        self._stages = stages
        self._buffers: dict[str, int] = {}
        self._actions: dict[Step, int] = {}
        self._ticks: dict[tuple[int, int, int], int] = {}
        self._period = lcm(schedule.period, INBOX_HALVES)
        # From this tick on every batch at work has left the special cases of the fill behind.
        most_slots = max(schedule.slots(stage) for stage in range(schedule.stages))
        self._filled = schedule.latency + most_slots + 1

    def submit(self, tick: int, batches: int | None = None) -> None:
        """Enqueue one tick of the epoch; blocks while too many ticks are in flight.

        Raises whatever an action of an earlier tick raised.
        """
        drained = -1 if batches is None else max(-1, tick - batches)
        key = (tick % self._period, min(tick, self._filled), drained)
        tick_id = self._ticks.get(key)
        if tick_id is None:
            tick_id = self._scheduler.add_tick(
                [
                    (self._register(step), action.batch - tick)
                    for action in self._schedule.tick(tick, batches)
                    for step in self._layout.steps(action)
                ]
            )
            self._ticks[key] = tick_id
        self._scheduler.submit(tick_id, tick)

    def _register(self, step: Step) -> int:
        known = self._actions.get(step)
        if known is None:
            known = self._scheduler.add_action(
                code=step.kind.value,
                stage=step.stage,
                slot=step.slot,
                stream=step.stream,
                reads=[self._buffer(name) for name in step.reads],
                writes=[self._buffer(name) for name in step.writes],
                work=self._stages[step.stage].work(step),
            )
            self._actions[step] = known
        return known

    def _buffer(self, name: str) -> int:
        if name not in self._buffers:
            self._buffers[name] = self._scheduler.add_buffer(
                name, shared=self._layout.is_shared(name)
            )
        return self._buffers[name]
