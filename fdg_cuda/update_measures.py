"""What stages measure of their updates: how stale the gradients are, how far the weights move.

A *step* is a batch, counted from 1 over all epochs. Of every ``every`` steps one is measured; with
``accumulate`` it is that of the update they have a part in, which is its last batch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fdg_cuda.flat import FlatMemory
from fdg_cuda.schedule import Schedule


@dataclass(frozen=True)
class Measured:
    """One update of one stage.

    Attributes:
        step: of the batch whose update it is.
        stage: 0-based.
        staleness: updates between the weights from which the gradient was computed and those it was
            applied to; of the oldest of several gradients.
        update_ratio: norm of the change of the stage's weights over the norm of the weights before it.
    """

    step: int
    stage: int
    staleness: int
    update_ratio: float


class UpdateMeasures:
    """Which updates are measured, and what was found.

    Args:
        every: steps from one that is measured to the next.

    Attributes:
        steps: batches that were trained, which whoever is told of them counts up.
        found: in the order of steps, then stages, for whoever takes it away; see :meth:`end_segment`.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps = 0
        self.found: list[Measured] = []
        self._steps_before = 0  # the segment
        self._schedule = Schedule("bp", 1)
        self._replays: list[bool] = []
        # Per stage and batch: norms of the weights' change, and of the weights.
        self._norms: list[dict[int, Tensor]] = []

    def begin_fit(self, schedule: Schedule, replays: Sequence[bool]) -> None:
        """The rule, and which stages run forwards again."""
        self._schedule = schedule
        self._replays = list(replays)

    def begin_segment(self) -> None:
        """The pipeline is empty, and its batches count from 0 again."""
        self._steps_before = self.steps
        self._norms = [{} for _ in self._replays]

    def wants(self, batch: int) -> bool:
        """Whether the update of ``batch`` of the segment is measured. Any thread may ask."""
        behind = self._steps_before + batch + 1
        before = self._steps_before + self._first(batch)
        return behind // self.every > before // self.every

    def put(self, stage: int, batch: int, norms: Tensor) -> None:
        """Take in float64 (2,), which may still be computed by the stage's device."""
        self._norms[stage][batch] = norms

    def end_segment(self) -> None:
        """Nothing is running any more: add the updates that all stages made to :attr:`found`, as far
        as their batches are counted."""
        known = self.steps - self._steps_before
        stages = [stage for stage, norms in enumerate(self._norms) if norms]
        batches = sorted(set().union(*self._norms)) if stages else []
        for batch in batches:
            if batch < known and all(batch in self._norms[stage] for stage in stages):
                self.found += [self._measured(stage, batch) for stage in stages]
        self._norms = [{} for _ in self._replays]

    def _measured(self, stage: int, batch: int) -> Measured:
        change, weights = self._norms[stage][batch].tolist()
        staleness = self._schedule.staleness_of(stage, self._first(batch))
        return Measured(
            self._steps_before + batch + 1,
            stage,
            # What was computed again was computed with the weights of the moment.
            0 if self._replays[stage] else staleness,
            change / weights if weights else (torch.inf if change else 0.0),
        )

    def _first(self, batch: int) -> int:
        """The first batch of the update that ``batch`` has a part in."""
        return batch // self._schedule.accumulate * self._schedule.accumulate


class UpdateMeter:
    """Measures the updates of one stage, in the stage's own turn.

    Args:
        memory: the stage's weights.
        stage: its number.
        measures: which updates, and where to.
    """

    def __init__(self, memory: FlatMemory, stage: int, measures: UpdateMeasures) -> None:
        self._memory = memory
        self._stage = stage
        self._measures = measures

    def around(self, source: int, target: int, batch: int) -> AbstractContextManager[None]:
        """Around the update of ``batch`` from weight copy ``source`` into ``target``: measures it if
        that is wanted. Waits for no device, and changes nothing."""
        return (
            self._measuring(source, target, batch) if self._measures.wants(batch) else nullcontext()
        )

    @contextmanager
    def _measuring(self, source: int, target: int, batch: int) -> Iterator[None]:
        before, after = self._memory.weights[source], self._memory.weights[target]
        if source == target:
            before = before.clone()
        yield
        with torch.no_grad():
            # Per parameter, so that no whole copy in float64 is made on the way.
            weights = self._memory.views(before)
            changes = list(torch._foreach_sub(self._memory.views(after), weights))
            norms = torch.stack([_norm(changes), _norm(weights)])
        self._measures.put(self._stage, batch, norms)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Of all elements together, float64, on their device."""
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack(list(torch._foreach_norm(tensors, 2, torch.float64)))
    )
    return norm
