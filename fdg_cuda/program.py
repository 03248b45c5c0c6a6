"""A schedule made executable: its actions with the buffers they touch, given to the C++ scheduler.

Buffers of stage k; everything but the two inboxes is used by stage k's own stream alone:

=============  ================================================================================
``w{k}.{s}``   weight copy s (one per slot in ``"stash"``, a single one in ``"current"``)
``v{k}``       momentum
``g{k}``       the gradients between a backward and its update
``n{k}``       module buffers (BatchNorm statistics)
``h{k}.{s}``   slot s: the autograd graph and activations of one batch
``o{k}``       the stage's latest output, on its way up
``d{k}``       the error signal the stage made last, on its way down
``a{k}.{p}``   inbox for activations from stage k-1; batch b arrives in half p = b mod 2
``e{k}.{p}``   inbox for error signals from stage k+1, likewise
=============  ================================================================================

Two halves per inbox let a stage send while its neighbour still works on what was sent before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from typing import Protocol

from fdg_cuda._core import Scheduler, Work
from fdg_cuda.schedule import Action, Kind, Schedule

INBOX_HALVES = 2


class StageWorks(Protocol):
    """What a stage does for each kind of action; ``None`` stands for nothing at all."""

    def work(self, action: Action) -> Callable[[int], None] | Work | None:
        """The work of ``action``, to be called with the batch's number within the epoch."""


class NoWork:
    """A stage that does nothing: for checking a schedule, and for timing the scheduler itself."""

    def work(self, action: Action) -> None:
        return None


class Program:
    """Feeds the ticks of a schedule to a scheduler, registering actions as they first occur.

    Args:
        schedule: the rule.
        scheduler: one stream per stage, in the order of the stages.
        stages: one per stage.
        stash: whether every slot has a weight copy of its own.
    """

    def __init__(
        self,
        schedule: Schedule,
        scheduler: Scheduler,
        stages: Sequence[StageWorks],
        *,
        stash: bool = True,
    ) -> None:
        self._schedule = schedule
        self._scheduler = scheduler
        self._stages = stages
        self._stash = stash
        self._buffers: dict[str, int] = {}
        self._actions: dict[tuple[Kind, int, int, int, int], int] = {}
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
                    (self._register(action), action.batch - tick)
                    for action in self._schedule.tick(tick, batches)
                ]
            )
            self._ticks[key] = tick_id
        self._scheduler.submit(tick_id, tick)

    def _register(self, action: Action) -> int:
        half = action.batch % INBOX_HALVES
        key = (action.kind, action.stage, action.slot, action.source, half)
        known = self._actions.get(key)
        if known is None:
            reads, writes = self._accesses(action, half)
            known = self._scheduler.add_action(
                code=action.kind.value,
                stage=action.stage,
                slot=action.slot,
                stream=action.stage,
                reads=[self._buffer(name) for name in reads],
                writes=[self._buffer(name) for name in writes],
                work=self._stages[action.stage].work(action),
            )
            self._actions[key] = known
        return known

    def _buffer(self, name: str) -> int:
        if name not in self._buffers:
            self._buffers[name] = self._scheduler.add_buffer(name, shared=name[0] in "ae")
        return self._buffers[name]

    def _accesses(self, action: Action, half: int) -> tuple[list[str], list[str]]:
        k = action.stage
        last = self._schedule.stages - 1
        weights = f"w{k}.{action.slot if self._stash else 0}"
        newest = f"w{k}.{action.source if self._stash else 0}"
        held = f"h{k}.{action.slot}"
        match action.kind:
            case Kind.COPY_WEIGHTS:
                return [newest], [weights]
            case Kind.FORWARD:
                inbox = [f"a{k}.{half}"] if k > 0 else []
                outbox = [f"o{k}"] if k < last else []
                return [weights, *inbox], [held, f"n{k}", *outbox, *inbox]
            case Kind.SEND_ACTIVATION:
                return [f"o{k}"], [f"a{k + 1}.{half}"]
            case Kind.BACKWARD:
                inbox = [f"e{k}.{half}"] if k < last else []
                outbox = [f"d{k}"] if k > 0 else []
                return [weights, held, *inbox], [held, f"g{k}", *outbox, *inbox]
            case Kind.SEND_ERROR:
                return [f"d{k}"], [f"e{k - 1}.{half}"]
            case Kind.UPDATE:
                return [newest, f"g{k}", f"v{k}"], [weights, f"v{k}"]
