"""Any module's forward as a chain, known once it was captured on a batch's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fdg_cuda.call_form import CallForm
from fdg_cuda.capture import capture, check_capturable
from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.graph_chain import GraphChain
from fdg_cuda.graph_stage import GraphStage
from fdg_cuda.model_chain import ModelChain, check_own_hooks
from fdg_cuda.names import counted
from fdg_cuda.nested import Nested
from fdg_cuda.torch_facts import has_hooks


@dataclass(frozen=True)
class _Captured:
    """What a capture found, and by what a later change of the model shows.

    Attributes:
        whole: the chain as one stage.
        called: ids of the modules it calls, and of those in them; the code of others is followed.
        modules: names and ids of all.
    """

    graph: GraphChain
    whole: GraphStage
    called: frozenset[int]
    modules: list[tuple[str, int]]


class CapturedChain(ModelChain):
    """
    Raises:
        TypeError: ``model`` has no forward.
        ModelCaptureError: it could not be trained here, on whatever sample.
        ValueError: it has a hook of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(model.forward, "__func__", None) is nn.Module.forward:
            raise TypeError(
                f"the model, a {type(model).__name__}, has no forward; give an nn.Module that has one, "
                f"or a list of modules that are called one behind the other"
            )
        check_capturable(model)
        self.model: nn.Module = model
        self._captured: _Captured | None = None
        self._stages: list[GraphStage] = []
        self._check_hooks()

    @property
    def is_laid_out(self) -> bool:
        return self._captured is not None

    def lay_out(self, sample: Nested) -> None:
        graph = capture(self.model, sample)
        (whole,) = graph.stages([])
        called = frozenset(id(module) for module in whole.modules())
        self._captured = _Captured(graph, whole, called, _named_modules(self.model))

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self._graph.pieces

    @property
    def pieces(self) -> int:
        return len(self._graph)

    def check_length(self, stages: int) -> None:
        count = len(self._graph)
        if count < stages:
            raise ModelCaptureError(
                f"the model can be cut into {counted(count, 'piece')} at most, too few "
                f"for {stages} stages: "
                f"{self._graph.what_forbids_cuts() or 'its forward makes no more calls'}"
            )

    def cut_at(self, point: str) -> int:
        return self._graph.cut_at(point)

    def point(self, cut: int) -> str:
        return self._graph.point(cut)

    def allowed_cuts(self) -> list[int]:
        return self._graph.allowed_cuts()

    def parts(self, cuts: Sequence[int]) -> list[list[nn.Module]]:
        self._stages = self._graph.stages(cuts)
        return [[stage] for stage in self._stages]

    def forward(self, x: Nested) -> Any:
        args, kwargs = CallForm(self.model, x).arguments(x)
        return self.model(*args, **kwargs)

    def check_unchanged(self) -> None:
        self._check_hooks()
        captured = self._captured
        if captured is None:
            return
        own = {id(parameter) for parameter in self.model.parameters()}
        directly_used = captured.whole.parameters(recurse=False)
        if _named_modules(self.model) != captured.modules or any(
            id(parameter) not in own for parameter in directly_used
        ):
            raise RuntimeError(
                "modules or parameters of the model were added, removed or replaced since it was "
                "captured; make a new FDGRunner for the changed model"
            )
        for stage in self._stages:
            stage.refresh()

    def _check_hooks(self) -> None:
        check_own_hooks(self.model, called="what its forward calls", instead="a submodule")
        if self._captured is None:
            return
        for path, module in self.model.named_modules():
            if has_hooks(module) and id(module) not in self._captured.called:
                raise ValueError(
                    f"{path} got a hook after the model was captured. It would not be called: stages "
                    f"follow the code of {path}'s forward. Register it before the runner is made."
                )

    @property
    def _graph(self) -> GraphChain:
        assert self._captured is not None, "lay_out comes first"
        return self._captured.graph


def _named_modules(model: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(m)) for path, m in model.named_modules(remove_duplicate=False)]
