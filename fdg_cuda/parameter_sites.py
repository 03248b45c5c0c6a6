"""Where layers keep their trainable parameters, and which leaves a graph puts gradients into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn


class ParameterSites:
    """Where the layers keep their trainable parameters, so that a slot's own can be put there."""

    def __init__(self, layers: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._sites: list[tuple[nn.Module, str, int, bool]] = []
        for module in {id(m): m for layer in layers for m in layer.modules()}.values():
            # Recurrent layers keep a second list of their weights up to date in __setattr__.
            observed = type(module).__setattr__ is not nn.Module.__setattr__
            for name, parameter in module._parameters.items():
                if id(parameter) in numbers:
                    self._sites.append((module, name, numbers[id(parameter)], observed))
        self._installed: Sequence[nn.Parameter] | None = None

    def install(self, parameters: Sequence[nn.Parameter]) -> None:
        if parameters is self._installed:
            return
        for module, name, number, observed in self._sites:
            if observed:
                setattr(module, name, parameters[number])
            else:
                module._parameters[name] = parameters[number]
        self._installed = parameters


def graph_leaves(roots: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors into which a backward from ``roots`` would put gradients."""
    yield from (root for root in roots if root.grad_fn is None and root.requires_grad)
    todo, seen = [root.grad_fn for root in roots], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo.extend(following for following, _ in node.next_functions)
