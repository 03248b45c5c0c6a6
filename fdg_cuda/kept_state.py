"""What optimizers know of a stage's parameters, kept while those are frozen, or not laid out yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fdg_cuda.stage_optimizer import STEP, StageOptimizer, State, copied


@dataclass(frozen=True)
class Kept:
    """The state of a parameter that had ``shape`` and ``dtype`` then."""

    shape: torch.Size
    dtype: torch.dtype
    state: State

    def of(self, parameter: Tensor) -> State:
        """For ``parameter`` as it is now: nothing if it has another shape, in its dtype if it was
        converted."""
        if parameter.shape != self.shape:
            return {}
        if parameter.dtype == self.dtype:
            return self.state
        return {
            name: value.to(parameter.dtype) if self._follows(name, value) else value
            for name, value in self.state.items()
        }

    def _follows(self, name: str, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and name != STEP
            and (value.shape, value.dtype) == (self.shape, self.dtype)
        )


class KeptState:
    """Of each parameter, while it lives, its state as it was kept last."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def keep(self, optimizer: StageOptimizer) -> None:
        """Keep what ``optimizer`` knows; its own tensors, so this is before another one takes over."""
        memory = optimizer.memory
        states = optimizer.states()
        for parameter, leaf, state in zip(memory.parameters, memory.leaves[0], states, strict=True):
            self._kept[parameter] = Kept(leaf.shape, leaf.dtype, state)

    def of(self, parameters: Sequence[nn.Parameter]) -> list[State]:
        """What is kept of each."""
        known = [self._kept.get(p, None) for p in parameters]  # type: ignore[no-untyped-call]
        return [
            {} if kept is None else kept.of(parameter)
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
            self._kept[parameter] = Kept(parameter.shape, parameter.dtype, copied(values))
