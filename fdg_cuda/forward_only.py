"""The rule of evaluation and prediction: the stages forward, and nothing else. Data only, no torch.

Stage k forwards batch t-k in tick t. What it sends in a tick the stage above uses in the next one.
Every stage has a stream of its own, and hands its output over by reference.

Buffers of stage k:

==========  ====================================================================================
``w{k}``    its layers: weights, and whatever else their forward reads
``a{k}.{p}`` inbox for activations from stage k-1; batch b arrives in half p = b mod 2
``o{k}``    its latest output, on its way up; at the last stage what is made of it
==========  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator

from fdg_cuda.layout import INBOX_HALVES, Step
from fdg_cuda.schedule import Action, Kind


class ForwardSchedule:
    """The schedule of forwards over ``stages`` stages."""

    def __init__(self, stages: int) -> None:
        self.stages = stages

    @property
    def latency(self) -> int:
        """Ticks beyond the number of batches."""
        return self.stages - 1

    @property
    def period(self) -> int:
        """Every tick is like the one before."""
        return 1

    def slots(self, stage: int) -> int:
        """Batches the stage holds at once."""
        return 1

    def tick(self, tick: int, batches: int | None = None) -> list[Action]:
        """The actions of one tick, in an order in which they could run one by one.

        Args:
            tick: 0-based.
            batches: how many there are; None while that is not known.
        """
        actions = []
        for stage in range(self.stages):
            batch = tick - stage
            if batch < 0 or (batches is not None and batch >= batches):
                continue
            actions.append(Action(Kind.FORWARD, stage, batch, slot=0))
            if stage < self.stages - 1:
                actions.append(Action(Kind.SEND_ACTIVATION, stage, batch, slot=0))
        return actions


class ForwardLayout:
    """One stream per stage."""

    def __init__(self, stages: int) -> None:
        self.streams = [f"evaluation of stage {stage}" for stage in range(stages)]

    def stage_of(self, stream: int) -> int:
        return stream

    def is_shared(self, buffer: str) -> bool:
        return buffer[0] == "a"

    def steps(self, action: Action) -> Iterator[Step]:
        k, half = action.stage, action.batch % INBOX_HALVES
        if action.kind is Kind.SEND_ACTIVATION:
            reads, writes = [f"o{k}"], [f"a{k + 1}.{half}"]
        else:
            # What is in the inbox is taken out of it.
            inbox = [f"a{k}.{half}"] if k > 0 else []
            reads, writes = [f"w{k}", *inbox], [f"o{k}", *inbox]
        yield Step(action.kind, k, action.slot, half, k, tuple(reads), tuple(writes))
