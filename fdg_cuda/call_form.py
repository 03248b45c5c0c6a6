"""How a batch's input is given to a model's forward, and what later inputs must have in common with
the sample it was captured on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.nested import Nested, sample_count

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class CallForm:
    """Turns an input into a call.

    - A tuple or list is the positional arguments of a forward that takes as many, and more than one.
    - A dict is the keyword arguments of a forward that has parameters of these names.
    - Anything else is the one argument.
    """

    def __init__(self, model: nn.Module, sample: Nested) -> None:
        self._names: list[str] = []  # of the forward's parameters
        try:
            signature = inspect.signature(model.forward)
        except (TypeError, ValueError):  # a forward written in C
            self.kind = "single"
            return
        self._names = list(signature.parameters)
        parameters = list(signature.parameters.values())
        if (
            isinstance(sample, Mapping)
            and _binds(signature, (), sample)
            and _named(parameters, sample)
        ):
            self.kind = "keywords"
        elif (
            isinstance(sample, (tuple, list))
            and not hasattr(sample, "_fields")
            and _takes_several(parameters)
            and _binds(signature, sample, {})
        ):
            self.kind = "positional"
        else:
            self.kind = "single"

    def arguments(self, value: Nested) -> Arguments:
        """Positional and keyword arguments of the forward for the input ``value``."""
        if self.kind == "keywords" and isinstance(value, Mapping):
            return (), {key: value[key] for key in sorted(value)}
        if self.kind == "positional" and isinstance(value, (tuple, list)):
            return tuple(value), {}
        return (value,), {}

    def told(self, value: Nested) -> str:
        """How :meth:`arguments` gives ``value``, for people; and of what was meant as several arguments
        and is none, why."""
        args, kwargs = self.arguments(value)
        if self.kind == "keywords":
            return f"as keyword arguments {', '.join(kwargs)}"
        if self.kind == "positional":
            return f"as {len(args)} positional arguments"
        several = len(self._names) > 1  # else one argument is what it takes
        taken = ", ".join(self._names)
        why = ""
        if isinstance(value, Mapping) and several:
            why = f" (the dict's keys, {', '.join(map(str, value))}, do not fit its parameters, {taken})"
        elif hasattr(value, "_fields") and several:
            why = f" (a namedtuple is one; a tuple would be spread over its parameters, {taken})"
        elif isinstance(value, (tuple, list)) and several:
            why = f" (the {len(value)} values do not fit its parameters, {taken})"
        return f"as its one argument{why}"


def _named(parameters: Sequence[inspect.Parameter], sample: Mapping[Any, Any]) -> bool:
    """Whether the dict's keys are names of parameters (and not taken by a ``**kwargs`` alone)."""
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return bool(names & set(sample))


def _takes_several(parameters: Sequence[inspect.Parameter]) -> bool:
    several = [
        p
        for p in parameters
        if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(several) > 1 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


def _binds(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[Any, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _outline(spec: Any) -> str:
    """Arguments with stars for what is in them: ``(*, [*, *])``, or ``{'x': *}`` for keywords."""
    positional, keywords = pytree.tree_unflatten([_Star()] * spec.num_leaves, spec)
    both = [str(part) for part in (positional, keywords) if part]
    return " and ".join(both) or "nothing"


class _Star:
    def __repr__(self) -> str:
        return "*"


@dataclass
class InputForm:
    """What every batch's input must be like.

    Attributes:
        call: how it is given to the model.
        spec, shapes, plains: of the sample: its containers, and for each leaf the shape of a tensor,
            or the plain value.
        free: (leaf, dimension) pairs whose size may differ from the sample's.
    """

    call: CallForm
    spec: Any
    shapes: list[tuple[int, ...] | None]
    plains: list[Any]
    free: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, sample: Nested) -> InputForm:
        call = CallForm(model, sample)
        leaves, spec = pytree.tree_flatten(call.arguments(sample))
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
        plains = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(call, spec, shapes, plains)

    def tensors(self, value: Nested) -> list[Tensor]:
        """The tensors in the input ``value``, in the order the model's inputs are numbered.

        Raises:
            ModelCaptureError: the input differs from the sample in what must be alike.
        """
        leaves, spec = pytree.tree_flatten(self.call.arguments(value))
        if spec != self.spec:
            raise ModelCaptureError(
                f"the input is not nested as the sample the model was captured with: "
                f"{_outline(spec)} instead of {_outline(self.spec)}"
            )
        for index, leaf in enumerate(leaves):
            self._check(index, leaf)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _check(self, index: int, leaf: Any) -> None:
        shape = self.shapes[index]
        if not isinstance(leaf, Tensor) or shape is None:
            if isinstance(leaf, Tensor) or shape is not None or leaf != self.plains[index]:
                raise ModelCaptureError(
                    f"{self._place(index)} is {_brief(leaf)}, but was {self._sample(index)} in the "
                    f"sample the model was captured with. What differs between batches must be a tensor."
                )
            return
        if len(shape) != leaf.ndim or any(
            size != now and (index, dim) not in self.free
            for dim, (size, now) in enumerate(zip(shape, leaf.shape, strict=True))
        ):
            free = ["*" if (index, d) in self.free else str(n) for d, n in enumerate(shape)]
            raise ModelCaptureError(
                f"{self._place(index)} has shape {tuple(leaf.shape)}, but the model was captured "
                f"for ({', '.join(free)}) and would run other code, or fail, for other sizes. Pad "
                f"or resize the batches, or capture with such a sample."
            )

    def _place(self, index: int) -> str:
        """For people."""
        if len(self.plains) == 1:
            return "the input"
        positional, keywords = pytree.tree_unflatten(list(range(len(self.plains))), self.spec)
        for name, value in [*enumerate(positional), *keywords.items()]:
            if value == index:
                return f"input {name!r}"
        return f"leaf {index} of the input"

    def _sample(self, index: int) -> str:
        shape = self.shapes[index]
        return _brief(self.plains[index]) if shape is None else f"a tensor of shape {shape}"

    # -- other sizes, to try the model with ---------------------------------------------------------

    def batch_dims(self, value: Nested) -> set[tuple[int, int]]:
        """The first dimensions that are as long as the batch."""
        count = sample_count(value)
        return {(i, 0) for i, shape in enumerate(self.shapes) if shape and shape[0] == count}

    def resized(self, value: Nested, dims: set[tuple[int, int]], size: int) -> Arguments:
        """The arguments for ``value`` with ``size`` in each of ``dims``: cut short, or begun anew."""
        leaves, spec = pytree.tree_flatten(self.call.arguments(value))
        for index, dim in dims:
            tensor = leaves[index]
            numbers = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            leaves[index] = tensor.index_select(dim, numbers)
        arguments: Arguments = pytree.tree_unflatten(leaves, spec)
        return arguments


def _brief(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)[:60]
