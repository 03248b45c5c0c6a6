"""Where a schedule's actions run and what they touch: on which streams, which buffers.

A *step* is one thing enqueued on one stream. On CPU devices every action of the schedule is one
step; on CUDA devices inputs, labels, hops and metrics have steps of their own on copy streams.

Buffers of stage k:

=============  ================================================================================
``w{k}.{s}``   weight copy s (one per slot in ``"stash"``, else a single one)
``v{k}``       momentum
``g{k}``       the gradients between a backward and its update
``n{k}``       module buffers (BatchNorm statistics)
``h{k}.{s}``   slot s: the autograd graph and activations of one batch; in ``"replay"`` its input
``a{k}.{p}``   inbox for activations from stage k-1; batch b arrives in half p = b mod 2
``e{k}.{p}``   inbox for error signals from stage k+1, likewise
``o{k}``       CPU: the stage's latest output, on its way up (CUDA sends it from the slot)
``d{k}``       the error signal the stage made last, on its way down
``x.{p}``      CUDA: inputs on stage 0's device
``y.{p}``      CUDA: labels on the last stage's device
``m``          CUDA: loss and correct answers of the last stage's latest batch
``A{k}.{p}``   CUDA, no peer access: pinned host memory for activations on their way to stage k
``E{k}.{p}``   CUDA, no peer access: pinned host memory for error signals on their way to stage k
=============  ================================================================================

Two halves per inbox let a stage send while its neighbour still works on what was sent before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.schedule import Action, Kind, Schedule

INBOX_HALVES = 2
PER_SLOT = "wh"  # of the buffers with a number behind the dot; the others have a half each


class Transfer(Enum):
    """Steps the schedule knows nothing of; the value is the letter in labels such as ``0I7``."""

    LOAD_INPUT = "I"
    LOAD_TARGET = "L"
    RECEIVE_ACTIVATION = "RA"
    RECEIVE_ERROR = "RE"
    READ_METRICS = "M"


@dataclass(frozen=True)
class Step:
    """One thing on one stream: ``stage``'s work on the batch in ``slot`` and inbox half ``half``.

    ``source`` is the slot whose weights a COPY_WEIGHTS or UPDATE reads. In what a stage receives
    ``slot`` is the sender's.
    """

    kind: Kind | Transfer
    stage: int
    slot: int
    half: int
    stream: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    source: int = -1


class Layout(Protocol):
    """The streams of a backend, and every action of a schedule as steps on them."""

    @property
    def streams(self) -> list[str]:
        """The streams' names; a stage's own come one after the other, its compute stream first."""

    def stage_of(self, stream: int) -> int:
        """Whose stream it is."""

    def is_shared(self, buffer: str) -> bool:
        """Whether several streams use ``buffer``."""

    def steps(self, action: Action) -> Iterator[Step]:
        """What ``action`` consists of, in an order in which it could run one by one."""


def copies(buffer: str, schedule: Schedule) -> int:
    """How many buffers of the kind of ``buffer`` take turns with the batches, itself included."""
    base, dot, _ = buffer.partition(".")
    if not dot:
        return 1
    return schedule.slots(int(base[1:])) if base[0] in PER_SLOT else INBOX_HALVES


def replaying(schedule: Schedule, mode: BackwardWeights) -> set[int]:
    """The stages whose backward runs the forward again."""
    return {k for k in range(schedule.stages) if mode.replays(schedule.slots(k))}


class CpuLayout:
    """One stream per stage; what a stage sends is handed over by reference."""

    def __init__(self, schedule: Schedule, mode: BackwardWeights) -> None:
        self._last = schedule.stages - 1
        self._stash = mode.copy_per_slot
        self._replaying = replaying(schedule, mode)
        self.streams = [f"stage {stage}" for stage in range(schedule.stages)]

    def stage_of(self, stream: int) -> int:
        return stream

    def is_shared(self, buffer: str) -> bool:
        return buffer[0] in "ae"

    def steps(self, action: Action) -> Iterator[Step]:
        half = action.batch % INBOX_HALVES
        reads, writes = self._accesses(action, half)
        yield Step(
            action.kind,
            action.stage,
            action.slot,
            half,
            action.stage,
            tuple(reads),
            tuple(writes),
            action.source,
        )

    def _accesses(self, action: Action, half: int) -> tuple[list[str], list[str]]:
        k = action.stage
        last = self._last
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
                buffers = [f"n{k}"] if k in self._replaying else []
                return [weights, held, *inbox], [held, f"g{k}", *buffers, *outbox, *inbox]
            case Kind.SEND_ERROR:
                return [f"d{k}"], [f"e{k - 1}.{half}"]
            case Kind.UPDATE:
                return [newest, f"g{k}", f"v{k}"], [weights, f"v{k}"]


class CudaLayout:
    """Three streams per stage: compute, and one each for what it sends and what it receives.

    Args:
        schedule: the rule.
        mode: which weights a backward uses.
        staged: per hop (0: between stages 0 and 1, ...) whether it goes through pinned host memory,
            since the two devices cannot reach each other. None: no hop does.
    """

    STREAMS_PER_STAGE = 3

    def __init__(
        self, schedule: Schedule, mode: BackwardWeights, *, staged: Sequence[bool] | None = None
    ) -> None:
        self._last = schedule.stages - 1
        self._stash = mode.copy_per_slot
        self._replaying = replaying(schedule, mode)
        self._staged = list(staged) if staged is not None else [False] * (schedule.stages - 1)
        self.streams = [
            f"stage {stage}{lane}"
            for stage in range(schedule.stages)
            for lane in ("", " send", " receive")
        ]

    @classmethod
    def compute(cls, stage: int) -> int:
        """The stage's compute stream."""
        return cls.STREAMS_PER_STAGE * stage

    @classmethod
    def send(cls, stage: int) -> int:
        """The stream of what the stage sends."""
        return cls.STREAMS_PER_STAGE * stage + 1

    @classmethod
    def receive(cls, stage: int) -> int:
        """The stream of what the stage takes in from the host."""
        return cls.STREAMS_PER_STAGE * stage + 2

    def stage_of(self, stream: int) -> int:
        return stream // self.STREAMS_PER_STAGE

    def is_shared(self, buffer: str) -> bool:
        return buffer[0] in "aeAEhdxym"

    def steps(self, action: Action) -> Iterator[Step]:
        k = action.stage
        last = self._last
        half = action.batch % INBOX_HALVES
        weights = f"w{k}.{action.slot if self._stash else 0}"
        newest = f"w{k}.{action.source if self._stash else 0}"
        held = f"h{k}.{action.slot}"

        def step(
            kind: Kind | Transfer,
            stream: int,
            reads: list[str],
            writes: list[str],
            stage: int = k,
        ) -> Step:
            return Step(
                kind, stage, action.slot, half, stream, tuple(reads), tuple(writes), action.source
            )

        match action.kind:
            case Kind.COPY_WEIGHTS:
                yield step(action.kind, self.compute(k), [newest], [weights])
            case Kind.FORWARD:
                reads, writes = [weights, f"a{k}.{half}"], [held, f"n{k}"]
                if k == 0:
                    yield step(Transfer.LOAD_INPUT, self.receive(k), [], [f"x.{half}"])
                    reads[1] = f"x.{half}"
                if k == last:
                    yield step(Transfer.LOAD_TARGET, self.receive(k), [], [f"y.{half}"])
                    reads.append(f"y.{half}")
                    writes.append("m")
                yield step(action.kind, self.compute(k), reads, writes)
                if k == last:
                    yield step(Transfer.READ_METRICS, self.send(k), ["m"], [])
            case Kind.SEND_ACTIVATION:
                # From the slot, which a later backward frees: it waits for this copy.
                target = [f"a{k + 1}.{half}"]
                if self._staged[k]:
                    stop = [f"A{k + 1}.{half}"]
                    yield step(action.kind, self.send(k), [held], stop)
                    yield step(
                        Transfer.RECEIVE_ACTIVATION, self.receive(k + 1), stop, target, k + 1
                    )
                else:
                    yield step(action.kind, self.send(k), [held], target)
            case Kind.BACKWARD:
                inbox = [f"e{k}.{half}"] if k < last else []
                outbox = [f"d{k}"] if k > 0 else []
                buffers = [f"n{k}"] if k in self._replaying else []
                yield step(
                    action.kind,
                    self.compute(k),
                    [weights, held, *inbox],
                    [held, f"g{k}", *buffers, *outbox],
                )
            case Kind.SEND_ERROR:
                target = [f"e{k - 1}.{half}"]
                if self._staged[k - 1]:
                    stop = [f"E{k - 1}.{half}"]
                    yield step(action.kind, self.send(k), [f"d{k}"], stop)
                    yield step(Transfer.RECEIVE_ERROR, self.receive(k - 1), stop, target, k - 1)
                else:
                    yield step(action.kind, self.send(k), [f"d{k}"], target)
            case Kind.UPDATE:
                yield step(
                    action.kind,
                    self.compute(k),
                    [newest, f"g{k}", f"v{k}"],
                    [weights, f"v{k}"],
                )
