"""What decides which batches a loader gives next, and what is drawn for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdg_cuda.errors import CheckpointError
from fdg_cuda.plain import from_plain, to_plain
from fdg_cuda.random_states import RandomStates

# Where a torch DataLoader, or a loader like it, has generators of its own.
PLACES = ("generator", "sampler.generator", "batch_sampler.sampler.generator")


@dataclass(frozen=True)
class DataState:
    """Of one moment.

    Attributes:
        random: the states of the generators everyone shares.
        generators: uint8, those of the loader's own, by their place.
        loader: what its ``state_dict`` gave, as plain values; None if it has none.
        tensors: those in ``loader``, by name.
    """

    random: RandomStates
    generators: dict[str, Tensor]
    loader: Any
    tensors: dict[str, Tensor]

    @classmethod
    def now(cls, loader: Any, ordinals: set[int]) -> DataState:
        """That of ``loader`` at this moment, with the generators of CUDA devices ``ordinals``.

        Raises:
            TypeError: the loader's state holds what a file cannot.
        """
        generators = {place: each.get_state() for place, each in _generators(loader).items()}
        tensors: dict[str, Tensor] = {}
        state = None
        if _has_state(loader):
            state = to_plain(loader.state_dict(), "the loader's state", tensors)
        return cls(RandomStates.now(ordinals), generators, state, tensors)

    def check(self, loader: Any) -> None:
        """Whether ``loader`` can be brought to this state.

        Raises:
            CheckpointError: it has other generators of its own.
        """
        theirs, ours = list(self.generators), list(_generators(loader))
        if theirs != ours:
            raise CheckpointError(
                f"the loader had generators of its own at: {', '.join(theirs) or 'none'}; now it has "
                f"them at: {', '.join(ours) or 'none'}. Give the loader of that run"
            )

    def restore(self, loader: Any) -> None:
        """Put everything back."""
        if self.loader is not None and _has_state(loader):
            loader.load_state_dict(from_plain(self.loader, self.tensors))
        self.restore_random(loader)

    def restore_random(self, loader: Any) -> None:
        """Put back all but what ``loader`` says of itself."""
        for place, generator in _generators(loader).items():
            generator.set_state(self.generators[place])
        self.random.restore()

    def to_tensors(self) -> dict[str, Tensor]:
        """All but :attr:`loader` as named tensors."""
        return {
            **{f"random.{name}": each for name, each in self.random.to_tensors().items()},
            **{f"generator.{place}": each for place, each in self.generators.items()},
            **{f"loader.{name}": each for name, each in self.tensors.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], loader: Any) -> DataState:
        """Of what :meth:`to_tensors` gave, and :attr:`loader`."""
        parts: dict[str, dict[str, Tensor]] = {"random": {}, "generator": {}, "loader": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        random = RandomStates.from_tensors(parts["random"])
        return cls(random, parts["generator"], loader, parts["loader"])


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _generators(loader: Any) -> dict[str, torch.Generator]:
    """Each once, though a DataLoader gives its own to its sampler."""
    found: dict[str, torch.Generator] = {}
    for place in PLACES:
        value = loader
        for name in place.split("."):
            value = getattr(value, name, None)
        if isinstance(value, torch.Generator) and value not in found.values():
            found[place] = value
    return found
