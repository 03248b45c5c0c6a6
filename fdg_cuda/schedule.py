"""The rule: which stage does what with which batch in which tick. Data only, no torch.

Symbols: K stages k = 0..K-1, batches b = 0..N-1 of one epoch, ticks t = 0, 1, ...

======  =======================  ==============================  ==============================
method  stage k forwards at t    stage k backwards at t          order inside a tick
======  =======================  ==============================  ==============================
fdg     batch t-k                batch t-(2K-2-k)                k < K-1: Backward, Update,
                                                                 Forward; k = K-1: Forward,
                                                                 Backward, Update
ddg     batch t, after k-1 did   batch t-(K-1-k)                 Forward, Backward, Update
bp      batch t, after k-1 did   batch t, after k+1 did          Forward, Backward, Update
======  =======================  ==============================  ==============================

FDG: Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients",
TNNLS 2022. DDG: Huo, Gu, Yang, Huang, "Decoupled Parallel Backpropagation with Convergence
Guarantee", ICML 2018.

What a stage sends in a tick its neighbour uses in the next one; only the activations of ``ddg`` and
everything in ``bp`` are used in the same tick.

A stage keeps the batches between their forward and their backward in *slots*: ``slots(k)`` of them,
used in turn. Each slot has a weight copy of its own (in the ``"stash"`` mode), and the newest
weights are always in the slot that is forwarded next: an update writes them there, and during
fill, when there is no update, a plain copy does.

With ``accumulate = M`` a stage adds up the gradients of batches jM..jM+M-1 and updates once, behind
the backward of the last of them (ADL: Zhuang, Lin, Toh, "Accumulated Decoupled Learning: Mitigating
Gradient Staleness in Inter-Layer Model Parallelization", arXiv 2012.03747); behind the other backwards
a plain copy takes the newest weights on to the next slot. What is left of an epoch whose N is no
multiple of M makes one more update. That batch N-1 is the last is known when the loader ends, in tick
N, so this update comes one tick behind the stage's last backward: in tick N + backward_tick(k, 0), in
place in the slot of batch N-1, and the epoch lasts a tick longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import lcm

METHODS = ("fdg", "ddg", "bp")


class Kind(Enum):
    """What an action does; the value is its letter in labels such as ``1F7``."""

    FORWARD = "F"
    BACKWARD = "B"
    UPDATE = "U"
    COPY_WEIGHTS = "C"
    SEND_ACTIVATION = "A"
    SEND_ERROR = "E"


@dataclass(frozen=True)
class Action:
    """One piece of one stage's work on one batch.

    ``slot`` is where the batch is held. For COPY_WEIGHTS and UPDATE it is the slot whose weights are
    written, and ``source`` the one they are made from.
    """

    kind: Kind
    stage: int
    batch: int
    slot: int
    source: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.batch}"


@dataclass(frozen=True)
class Schedule:
    """The schedule of ``method`` over ``stages`` stages, with an update per ``accumulate`` batches.

    Raises:
        ValueError: unknown method, less than one stage, or less than one batch per update.
    """

    method: str
    stages: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.stages < 1:
            raise ValueError(f"a schedule needs at least one stage; got {self.stages}")
        if self.accumulate < 1:
            raise ValueError(
                f"accumulate must be at least 1 batch per update; got {self.accumulate}"
            )

    def forward_tick(self, stage: int, batch: int) -> int:
        """The tick in which ``stage`` forwards ``batch``."""
        return batch + stage if self.method == "fdg" else batch

    def delay(self, stage: int) -> int:
        """Ticks between a batch's forward and its backward at ``stage`` (D_k for ``fdg``)."""
        if self.method == "fdg":
            return 2 * (self.stages - 1 - stage)
        return self.stages - 1 - stage if self.method == "ddg" else 0

    def backward_tick(self, stage: int, batch: int) -> int:
        """The tick in which ``stage`` backwards ``batch`` and makes that batch's update."""
        return self.forward_tick(stage, batch) + self.delay(stage)

    def backward_first(self, stage: int) -> bool:
        """Whether the stage's order inside a tick is Backward, Update, Forward."""
        return self.method == "fdg" and stage < self.stages - 1

    def staleness(self, stage: int) -> int:
        """Updates the stage makes at most between a batch's forward and that batch's own update."""
        return -(-self._batches_between(stage) // self.accumulate)

    def staleness_of(self, stage: int, batch: int) -> int:
        """Updates the stage makes between the forward of ``batch``, counted from the latest fill, and
        the update that it has a part in."""
        backwards_before_forward = max(0, batch - self._batches_between(stage))
        return batch // self.accumulate - backwards_before_forward // self.accumulate

    def slots(self, stage: int) -> int:
        """Batches the stage holds at once: max(1, D_k), and one more where the forward of a tick
        comes before its backward."""
        return self._batches_between(stage) + 1

    def _batches_between(self, stage: int) -> int:
        """Backwards of other batches between a batch's forward and its own."""
        return self.delay(stage) - 1 if self.backward_first(stage) else self.delay(stage)

    def slot(self, stage: int, batch: int) -> int:
        """The slot that holds ``batch`` at ``stage``."""
        return self.forward_tick(stage, batch) % self.slots(stage)

    def shrinks(self, stage: int) -> int:
        """How often beta multiplies the stage's gradients: K-1-k, never in ``bp``."""
        return 0 if self.method == "bp" else self.stages - 1 - stage

    @property
    def latency(self) -> int:
        """Ticks from a batch's entry to its last backward."""
        return self.backward_tick(0, 0)

    def ticks(self, batches: int) -> int:
        """How many ticks an epoch of ``batches`` batches takes."""
        if batches == 0:
            return 0
        return batches + self.latency + (batches % self.accumulate > 0)

    @property
    def period(self) -> int:
        """After so many ticks every stage is at the same slot, and as far from its next update,
        again."""
        return lcm(self.accumulate, *(self.slots(stage) for stage in range(self.stages)))

    def first_slot(self, stage: int) -> int:
        """The slot that must hold the newest weights before an epoch's first tick."""
        return self.slot(stage, 0)

    def tick(self, tick: int, batches: int | None = None) -> list[Action]:
        """The actions of one tick, in an order in which they could run one by one.

        Args:
            tick: 0-based within the epoch.
            batches: the epoch's number of batches; None while it is not known to have ended.
        """
        if self.method == "bp":
            return [
                *(a for k in range(self.stages) for a in self._forward(k, tick, batches)),
                *(
                    a
                    for k in reversed(range(self.stages))
                    for a in self._backward(k, tick, batches)
                ),
            ]
        actions: list[Action] = []
        for k in range(self.stages):
            parts = [self._forward(k, tick, batches), self._backward(k, tick, batches)]
            for part in reversed(parts) if self.backward_first(k) else parts:
                actions.extend(part)
        return actions

    def epoch(self, batches: int) -> Iterator[list[Action]]:
        """All ticks of an epoch, fill and drain included."""
        for tick in range(self.ticks(batches)):
            yield self.tick(tick, batches)

    def _forward(self, stage: int, tick: int, batches: int | None) -> Iterator[Action]:
        batch = tick - self.forward_tick(stage, 0)
        if batch < 0 or (batches is not None and batch >= batches):
            return
        slot = self.slot(stage, batch)
        # Every slot's first batch of an epoch: no update has written the newest weights there yet.
        if 0 < batch < self.slots(stage):
            yield Action(Kind.COPY_WEIGHTS, stage, batch, slot, self.slot(stage, batch - 1))
        yield Action(Kind.FORWARD, stage, batch, slot)
        if stage < self.stages - 1:
            yield Action(Kind.SEND_ACTIVATION, stage, batch, slot)

    def _backward(self, stage: int, tick: int, batches: int | None) -> Iterator[Action]:
        batch = tick - self.backward_tick(stage, 0)
        if batches and batch == batches and batches % self.accumulate:
            slot = self.slot(stage, batches - 1)
            yield Action(Kind.UPDATE, stage, batches - 1, slot, slot)
        if batch < 0 or (batches is not None and batch >= batches):
            return
        slot = self.slot(stage, batch)
        yield Action(Kind.BACKWARD, stage, batch, slot)
        if stage > 0:
            yield Action(Kind.SEND_ERROR, stage, batch, slot)
        # The update before this one wrote the newest weights; before an epoch's first update every
        # filled slot holds them.
        source = self.slot(stage, batch - 1) if batch > 0 else slot
        if (batch + 1) % self.accumulate == 0:
            yield Action(Kind.UPDATE, stage, batch, slot, source)
        elif source != slot:
            yield Action(Kind.COPY_WEIGHTS, stage, batch, slot, source)
