"""What a stage's optimizer remembers from update to update, and torch optimizers at work in a stage."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda.flat import FlatMemory
from fdg_cuda.gradients import Ready

MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name
STEP = "step"  # which torch's optimizers choose the dtype and device of by their own settings

State = Mapping[str, Any]  # of one parameter: tensors and plain values, by name


def copied(state: State) -> dict[str, Any]:
    """A state of its own memory."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


class StageOptimizer(ABC):
    """The state of one stage's optimizer, in the order of ``memory.parameters``.

    Args:
        memory: the stage's weights.
    """

    def __init__(self, memory: FlatMemory) -> None:
        self.memory = memory

    @abstractmethod
    def states(self) -> Sequence[State]:
        """What is remembered of each parameter; the tensors are the optimizer's own."""

    @abstractmethod
    def load(self, states: Sequence[State]) -> None:
        """Go on from ``states``, which are copied.

        Raises:
            ValueError: they are another optimizer's.
        """

    def snapshot(self) -> list[dict[str, Any]]:
        """A copy of the states, for :meth:`load`."""
        return [copied(state) for state in self.states()]


class FusedSgd(StageOptimizer):
    """The fused update's momentum."""

    def states(self) -> Sequence[State]:
        if not self.memory.has_momentum:
            return [{} for _ in self.memory.parameters]
        return [{MOMENTUM: view} for view in self.memory.views(self.memory.momentum)]

    def load(self, states: Sequence[State]) -> None:
        for state in states:
            if not state.keys() <= {MOMENTUM}:
                raise ValueError(
                    f"the state of an optimizer with {', '.join(sorted(state))} per parameter is not "
                    f"the fused SGD's, which has {MOMENTUM}; make the runner with the optimizer= that "
                    f"it was saved with"
                )
        if not self.memory.has_momentum and not any(states):
            return
        for view, state in zip(self.memory.views(self.memory.momentum), states, strict=True):
            momentum = state.get(MOMENTUM)
            if momentum is None:
                view.zero_()
            else:
                view.copy_(momentum)


class TorchOptimizer(StageOptimizer):
    """A torch optimizer over parameters of its own, which are put onto the weight copy that an
    update writes.

    Args:
        memory: the stage's weights.
        parameters: the optimizer's, in the order of ``memory.parameters``.
        optimizer: made for them.
    """

    def __init__(
        self,
        memory: FlatMemory,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        super().__init__(memory)
        self._parameters = list(parameters)
        self._optimizer = optimizer
        # Some make their state when they are made (Adagrad), and never again.
        self._initial = self.snapshot()

    @property
    def groups(self) -> list[int]:
        """The number of each parameter's group."""
        numbers = {
            id(parameter): number
            for number, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        return [numbers[id(parameter)] for parameter in self._parameters]

    def update(
        self, source: int, target: int, ready: Ready, hyper: Sequence[Mapping[str, Any]]
    ) -> None:
        """From weight copy ``source`` into ``target``, with ``hyper`` per parameter group."""
        memory = self.memory
        memory.copy_weights(source, target)
        for group, values in zip(self._optimizer.param_groups, hyper, strict=True):
            group.update(values)
        factors = [
            shrink
            for shrink, gradient in zip(ready.shrinks, ready.gradients, strict=True)
            if gradient is not None
        ]
        present = [gradient for gradient in ready.gradients if gradient is not None]
        # New tensors, whatever the factors are: some optimizers change gradients in place.
        shrunk: list[Tensor] = []
        if present:
            shrunk = list(torch._foreach_mul(present, factors))
            gain: Any = ready.gain
            # A tensor is not looked at, or the host would wait for its device.
            if isinstance(gain, Tensor) or gain != 1:
                torch._foreach_mul_(shrunk, gain)
        own = iter(shrunk)
        for parameter, leaf, gradient in zip(
            self._parameters, memory.leaves[target], ready.gradients, strict=True
        ):
            parameter.data = leaf.data
            parameter.grad = None if gradient is None else next(own)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        memory.count_update()

    def states(self) -> Sequence[State]:
        known = self._optimizer.state
        return [known.get(p, {}) for p in self._parameters]

    def load(self, states: Sequence[State]) -> None:
        of = {
            id(parameter): {name: _laid_out(value, parameter) for name, value in known.items()}
            for parameter, state, initial in zip(
                self._parameters, states, self._initial, strict=True
            )
            if (known := copied(state or initial))
        }
        if not of:
            for parameter in self._parameters:
                self._optimizer.state.pop(parameter, None)
            return
        packed = self._optimizer.state_dict()
        in_order = (p for group in self._optimizer.param_groups for p in group["params"])
        packed["state"] = {n: of[id(p)] for n, p in enumerate(in_order) if id(p) in of}
        self._optimizer.load_state_dict(packed)
        for parameter in self._parameters:
            self._keep_dtypes(self._optimizer.state[parameter], of.get(id(parameter), {}))

    @staticmethod
    def _keep_dtypes(loaded: dict[str, Any], state: State) -> None:
        """torch makes everything of the parameter's dtype, NAdam's running product too."""
        for name, value in state.items():
            now = loaded.get(name)
            if name == STEP or not (isinstance(value, Tensor) and isinstance(now, Tensor)):
                continue
            if now.dtype != value.dtype:
                loaded[name] = value.to(now.device)


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A tensor of the parameter's shape in its strides, which a file does not keep; anything else as
    it is."""
    if (
        not isinstance(value, Tensor)
        or value.shape != parameter.shape
        or value.stride() == parameter.stride()
    ):
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
