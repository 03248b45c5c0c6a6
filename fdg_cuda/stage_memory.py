"""The bytes that a stage needs of its device, from what its layers cost.

What is held grows with the delay, so the early stages need most. With S slots (``Schedule.slots``):

============  ======================================================================================
weights       trainable parameters: S copies with ``"stash"``, else 1
optimizer     what it remembers from update to update: momentum, or Adam's two averages
gradients     2: those of the backward under way, and of the one before, which go behind it
snapshot      weights and optimizer as the epoch found them, to go back to
fixed         buffers and frozen parameters
activations   what autograd keeps of S batches, beside the stage's input; where forwards are run
              again of 1. The stage's input of S batches.
hops          inboxes of 2 halves for activations and error signals, outputs of S batches on their way
              up (and, of several tensors, the memory they are packed into to be sent), and the error
              signals that are taken and given
============  ======================================================================================

Hops are counted as on CUDA devices; stages on the CPU hand over by reference and hold less. Not
counted: what layers allocate while they compute (work spaces, intermediate gradients), what captured
graphs hold in addition, labels, and the device's own needs. :data:`SPARE` leaves room for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.costs import LayerCost
from fdg_cuda.layout import INBOX_HALVES
from fdg_cuda.schedule import Schedule

# The share of a device's memory that stages leave to what is not counted here.
SPARE = 0.1
GRADIENTS = 2
# How many times its parameters' bytes an optimizer remembers.
SGD_STATE, ADAM_STATE = 1, 2


@dataclass(frozen=True)
class StageMemory:
    """Bytes, by what they are for; see above."""

    weights: int
    optimizer: int
    gradients: int
    snapshot: int
    fixed: int
    activations: int
    hops: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


Parts = dict[str, Any]  # bytes, or arrays of bytes, by the names of StageMemory's fields


@dataclass(frozen=True)
class Holding:
    """How often a stage holds what. It is linear in its layers' costs: a part that every layer
    adds, one of the first layer and one of the last. The methods take a :class:`LayerCost`, or
    anything that has arrays in place of its numbers.

    Attributes:
        slots: batches in flight.
        saved: batches of which activations are kept.
        forwards: how often each batch is forwarded.
        copies: of the weights.
        state: of the optimizer, in times the parameters' bytes.
        is_first, is_last: in the chain.
    """

    slots: int
    saved: int
    forwards: int
    copies: int
    state: int
    is_first: bool
    is_last: bool

    @classmethod
    def of(
        cls, schedule: Schedule, mode: BackwardWeights, stage: int, *, state: int = SGD_STATE
    ) -> Holding:
        """That of ``stage``."""
        slots = schedule.slots(stage)
        return cls(
            slots=slots,
            saved=1 if mode.replays(slots) else slots,
            forwards=2 if mode.replays(slots) else 1,
            copies=slots if mode.copy_per_slot else 1,
            state=state,
            is_first=stage == 0,
            is_last=stage == schedule.stages - 1,
        )

    def of_layer(self, cost: Any) -> Parts:
        """What every layer adds."""
        weights = cost.parameter_bytes
        return {
            "weights": self.copies * weights,
            "optimizer": self.state * weights,
            "gradients": GRADIENTS * weights,
            "snapshot": (1 + self.state) * weights,
            "fixed": cost.fixed_bytes,
            "activations": self.saved * (cost.saved_bytes + cost.kept_input_bytes),
        }

    def of_first(self, cost: Any) -> Parts:
        """What the stage's first layer adds."""
        # All of its input is held, so that what autograd keeps of it is no more.
        held = self.slots * cost.input_bytes - self.saved * cost.kept_input_bytes
        error = 0 if self.is_first else 1
        return {
            "activations": held,
            "hops": INBOX_HALVES * cost.input_bytes + error * cost.error_bytes,
        }

    def of_last(self, cost: Any, above: Any) -> Parts:
        """What the stage's last layer adds; ``above``: the layer behind it."""
        if self.is_last:
            return {}
        # What is sent; and where a backward begins from the forward that made it, the output itself,
        # which is the same memory if it is one tensor.
        sent = cost.output_bytes
        if self.forwards == 1:
            sent = sent + cost.packed_bytes - cost.kept_output_bytes
        # The inbox's halves, and the copy that a backward works on.
        errors = (INBOX_HALVES + 1) * above.error_bytes
        return {"hops": self.slots * sent + errors}


def stage_memory(
    costs: Sequence[LayerCost], above: LayerCost | None, holding: Holding
) -> StageMemory:
    """What a stage of layers with these ``costs`` needs.

    Args:
        above: the cost of the first layer of the next stage; None at the last.
    """
    totals = dict.fromkeys((field.name for field in fields(StageMemory)), 0)
    parts = [*map(holding.of_layer, costs), holding.of_first(costs[0])]
    if above is not None:
        parts.append(holding.of_last(costs[-1], above))
    for part in parts:
        for name, nbytes in part.items():
            totals[name] += nbytes
    return StageMemory(**totals)
