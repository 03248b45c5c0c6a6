"""How one stage comes from its gradients to new weights, and what its optimizer remembers.

The fused SGD's updates are native actions; Python has a part in those that clip, accumulate, unscale,
measure, or are a torch optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from fdg_cuda.flat import FlatMemory
from fdg_cuda.gradients import Gradients, UpdateRule
from fdg_cuda.hyper import HyperTable
from fdg_cuda.kept_state import KeptState
from fdg_cuda.optim import DelayedOptimizer, DelayedTorch
from fdg_cuda.stage_optimizer import FusedSgd, StageOptimizer, State, TorchOptimizer
from fdg_cuda.update_measures import UpdateMeasures, UpdateMeter

# The fused update, now: (source, copy, row, batch).
NativeUpdate = Callable[[int, int, int, int], None]


class StageUpdates:
    """Updates of stage ``index``, whose weights lie in ``memory``.

    Args:
        rule: how it comes from gradients to an update.

    Attributes:
        gradients: of the running ``fit``, if Python has a part in them.
    """

    def __init__(self, memory: FlatMemory, index: int, rule: UpdateRule) -> None:
        self.gradients: Gradients | None = None
        self._memory = memory
        self._index = index
        self._rule = rule
        self._meter: UpdateMeter | None = None  # of the running fit, if updates are measured
        self._kept = KeptState()
        self._optimizer: StageOptimizer | None = None  # over the memory, once there was an update

    @property
    def native(self) -> bool:
        """Whether the fused SGD makes them."""
        return self._rule.optimizer is None

    @property
    def in_python(self) -> bool:
        """Whether in the running ``fit`` they are made by :meth:`run`."""
        return self.gradients is not None or self._meter is not None

    # -- between and around fits ----------------------------------------------------------------

    def follow(self, memory: FlatMemory) -> None:
        """Other parameters than before are trained: go on with ``memory``, and with what is known of
        each. Those that are frozen now may come back."""
        if self._optimizer is not None:
            self._kept.keep(self._optimizer)
        self._optimizer = None
        self._memory = memory

    def begin_fit(self, hyper: HyperTable) -> dict[str, Any]:
        """Make what updates need that Python has a part in.

        Returns:
            What a native update has to know beyond the memory; see :meth:`FlatMemory.addresses`.
        """
        parameters = self._memory.parameters
        if self._optimizer is None:
            self._optimizer = self._make_optimizer(hyper.optimizer)
            kept = self._kept.of(parameters)
            if any(kept):
                self._optimizer.load(kept)
        if isinstance(self._optimizer, TorchOptimizer):
            groups = self._optimizer.groups
        else:
            groups = hyper.optimizer.groups_of(parameters)
        if self._rule.needs_python:
            self.gradients = Gradients(self._memory, self._rule, hyper, groups)
        gain = None if self.gradients is None else self.gradients.gain
        return {"groups": groups, "gain": gain}

    def measure(self, measures: UpdateMeasures) -> None:
        """Measure updates of this ``fit``, of which none was enqueued yet."""
        if self._memory.parameters:
            self._meter = UpdateMeter(self._memory, self._index, measures)

    def end_fit(self) -> None:
        """Let go of what only a running ``fit`` needs."""
        self.gradients = self._meter = None

    def _make_optimizer(self, face: DelayedOptimizer) -> StageOptimizer:
        memory = self._memory
        if not isinstance(face, DelayedTorch) or not memory.parameters:
            return FusedSgd(memory)
        tensors = [nn.Parameter(leaf.data) for leaf in memory.leaves[0]]
        return TorchOptimizer(
            memory, tensors, face.make_for(memory.parameters, tensors, self._index)
        )

    # -- what the optimizer remembers -----------------------------------------------------------

    def state(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, dict[str, Any]]:
        """See :meth:`fdg_cuda.stage.Stage.optimizer_state`; ``parameters`` are all of the stage."""
        if self._optimizer is not None:
            self._kept.keep(self._optimizer)
        return self._kept.copies(parameters)

    def load(self, state: Mapping[nn.Parameter, State]) -> None:
        """Go on from what :meth:`state` returned."""
        self._kept.replace(state)
        if self._optimizer is not None:
            self._optimizer.load(self._kept.of(self._memory.parameters))

    def snapshot(self) -> list[dict[str, Any]]:
        """Copies per parameter; empty before the first update."""
        return [] if self._optimizer is None else self._optimizer.snapshot()

    def restore(self, snapshot: list[dict[str, Any]]) -> None:
        """Go back to ``snapshot``."""
        if self._optimizer is not None:
            self._optimizer.load(snapshot)

    # -- an update --------------------------------------------------------------------------------

    def run(
        self, source: int, copy: int, row: int, batch: int, update_natively: NativeUpdate
    ) -> None:
        """The update of ``batch``: from weight copy ``source`` into ``copy``, with the gradients of
        ``row``."""
        with nullcontext() if self._meter is None else self._meter.around(source, copy, batch):
            if self.gradients is None:
                update_natively(source, copy, row, batch)
                return
            ready = self.gradients.prepare(batch)
            if isinstance(self._optimizer, TorchOptimizer) and ready.skipped:
                self._memory.copy_weights(source, copy)
                self._memory.count_update()
            elif isinstance(self._optimizer, TorchOptimizer):
                self._optimizer.update(source, copy, ready, self.gradients.hyper.values(batch))
            else:
                self.gradients.place(ready, row)
                update_natively(source, copy, row, batch)
