"""A model as a chain: what of it is measured, where it can be cut, and what its stages consist of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from fdg_cuda.nested import Nested

# Where a module keeps its hooks, and what people call those.
HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


class ModelChain(ABC):
    """Layers that run one behind the other, counted from 0. A cut is the number of the layer before
    which it is made.

    Attributes:
        model: the user's module, whose names are those of states, parameter groups and checkpoints.
    """

    model: nn.Module

    @property
    def is_training(self) -> bool:
        """False if the model was put in evaluation mode as a whole."""
        return any(module.training for module in list(self.model.children()) or [self.model])

    @property
    @abstractmethod
    def is_laid_out(self) -> bool:
        """Whether the layers are known; where not, :meth:`lay_out` comes before all that is about
        them."""

    @abstractmethod
    def lay_out(self, sample: Nested) -> None:
        """Find the layers, on a batch's input.

        Raises:
            TypeError: the sample is none.
            ModelCaptureError: the forward cannot be followed, or the sample does not fit.
        """

    @property
    def has_cuts_inside(self) -> bool:
        """Whether there are modules within the layers, between which capturing would cut."""
        return False

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The finest parts there are, to be measured."""

    @property
    @abstractmethod
    def pieces(self) -> int | None:
        """How many layers were found by capturing, which with another torch may be others; None where
        they are the user's own."""

    @abstractmethod
    def check_length(self, stages: int) -> None:
        """Raises:
        ValueError, ModelCaptureError: fewer layers than stages.
        """

    @abstractmethod
    def cut_at(self, point: str) -> int:
        """The cut before the submodule named ``point``.

        Raises:
            ValueError, ModelCaptureError: there is no such submodule, or it cannot be cut there.
        """

    @abstractmethod
    def point(self, cut: int) -> str:
        """What begins at ``cut``, for people: the name of a submodule if one does."""

    @abstractmethod
    def allowed_cuts(self) -> list[int]:
        """All that can be made, in any combination."""

    @abstractmethod
    def parts(self, cuts: Sequence[int]) -> list[list[nn.Module]]:
        """The layers of each of ``len(cuts) + 1`` stages.

        Raises:
            ValueError, ModelCaptureError: cuts that cannot be made.
        """

    @abstractmethod
    def forward(self, x: Nested) -> Any:
        """What the whole model gives for the input ``x``, in the mode it is in."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Refuse what a caller may have changed since the layers were found; and follow the buffers
        that were replaced.

        Raises:
            RuntimeError: modules were added, removed or replaced.
            ValueError: there are hooks that stages would not call.
        """


def check_own_hooks(model: nn.Module, *, called: str, instead: str) -> None:
    """
    Args:
        called: what stages call in place of ``model``.
        instead: where hooks would be called.

    Raises:
        ValueError: ``model`` itself, not a module in it, has a hook.
    """
    for attribute, name in HOOKS.items():
        if getattr(model, attribute, None):
            raise ValueError(
                f"the model itself has a {name}, which would not be called: stages call {called}. "
                f"Register it on {instead}."
            )
