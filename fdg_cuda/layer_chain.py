"""The children of an ``nn.Sequential`` as a chain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from fdg_cuda.chain import check_shared
from fdg_cuda.model_chain import ModelChain, check_own_hooks
from fdg_cuda.names import counted, did_you_mean, first_of
from fdg_cuda.nested import Nested
from fdg_cuda.split import check_split


class LayerChain(ModelChain):
    """
    Raises:
        ValueError: ``model`` has a hook of its own.
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.model: nn.Sequential = model
        self._layers = list(model)
        self._check_hooks()

    @property
    def is_laid_out(self) -> bool:
        return True

    def lay_out(self, sample: Nested) -> None:
        """The layers are known without."""

    @property
    def has_cuts_inside(self) -> bool:
        return any(next(layer.children(), None) is not None for layer in self._layers)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self._layers

    @property
    def pieces(self) -> None:
        return None

    def check_length(self, stages: int) -> None:
        count = len(self._layers)
        if count < stages:
            raise ValueError(
                f"the model has {counted(count, 'child', 'children')}, too few for {stages} stages; "
                f"give at most {counted(count, 'device')}, a model with more children, or capture=True "
                f"(--capture), which cuts inside of them"
            )

    def cut_at(self, point: str) -> int:
        names = list(self.model._modules)
        if point in names:
            return names.index(point)
        child, _, inside = point.partition(".")
        if inside and child in names:
            raise ValueError(
                f"split_points: {point!r} lies inside of {child!r}, and an nn.Sequential is cut between "
                f"its children only, unless capture=True; the nearest is {child!r}"
            )
        raise ValueError(
            f"split_points: the model has no child {point!r}; its children are {first_of(names)}."
            f"{did_you_mean(point, names)}"
        )

    def point(self, cut: int) -> str:
        return list(self.model._modules)[cut]

    def allowed_cuts(self) -> list[int]:
        layers, cuts = self._layers, range(1, len(self._layers))
        if self._can_be_apart([[layer] for layer in layers]):
            return list(cuts)
        return [cut for cut in cuts if self._can_be_apart([layers[:cut], layers[cut:]])]

    def _can_be_apart(self, stages: Sequence[Sequence[nn.Module]]) -> bool:
        try:
            check_shared(self.model, stages)
        except ValueError:
            return False
        return True

    def parts(self, cuts: Sequence[int]) -> list[list[nn.Module]]:
        bounds = [0, *check_split(cuts, len(self._layers), len(cuts) + 1), len(self._layers)]
        return [self._layers[a:b] for a, b in pairwise(bounds)]

    def forward(self, x: Nested) -> Any:
        return self.model(x)

    def check_unchanged(self) -> None:
        if [id(layer) for layer in self.model] != [id(layer) for layer in self._layers]:
            raise RuntimeError(
                "layers of the model were added, removed or replaced since this runner was made; "
                "make a new FDGRunner for the changed model"
            )
        self._check_hooks()

    def _check_hooks(self) -> None:
        check_own_hooks(
            self.model, called="its layers one by one", instead="a layer, model[0] or model[-1] say"
        )
