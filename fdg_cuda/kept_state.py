"""What optimizers know of a stage's parameters, kept while those are frozen, or not laid out yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fdg_cuda.stage_optimizer import StageOptimizer, State, copied


class KeptState:
    """Of each parameter, while it lives, the state and the shape it had then."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def keep(self, optimizer: StageOptimizer) -> None:
        """Keep what ``optimizer`` knows; its own tensors, so this is before another one takes over."""
        memory = optimizer.memory
        states = optimizer.states()
        for parameter, leaf, state in zip(memory.parameters, memory.leaves[0], states, strict=True):
            self._kept[parameter] = leaf.shape, state

    def of(self, parameters: Sequence[nn.Parameter]) -> list[State]:
        """What is kept of each, if it has the shape it had."""
        known = [self._kept.get(p, None) for p in parameters]  # type: ignore[no-untyped-call]
        return [
            kept[1] if kept is not None and kept[0] == parameter.shape else {}
            for kept, parameter in zip(known, parameters, strict=True)
        ]

    def copies(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, dict[str, Any]]:
        """Of those parameters of which something is kept."""
        states = zip(parameters, self.of(parameters), strict=True)
        return {parameter: copied(state) for parameter, state in states if state}

    def replace(self, state: Mapping[nn.Parameter, State]) -> None:
        """Keep a copy of ``state`` and nothing else."""
        self._kept = WeakTensorKeyDictionary()
        for parameter, values in state.items():
            self._kept[parameter] = parameter.shape, copied(values)
