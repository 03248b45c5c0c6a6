"""Nested values (inputs, targets, what stages pass on): a tensor, or tuples, lists and dicts of tensors
and plain values.

What counts as a container is what ``torch.utils._pytree`` knows: tuples, lists, dicts, named tuples,
``OrderedDict``, ``defaultdict``, ``deque``, and classes registered there.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Nested = Any  # a tensor, or containers of tensors and plain values

# What may be there beside tensors: it is handed on as it is.
PLAIN = (
    NoneType,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    torch.dtype,
    torch.device,
    torch.Size,
)


def map_tensors(function: Callable[[Tensor], Any], value: Nested) -> Nested:
    """``value`` in new containers, with ``function`` of every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    return pytree.tree_map_only(Tensor, function, value)


def tensors(value: Nested) -> list[Tensor]:
    """The tensors in ``value``, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def distinct(value: Nested) -> list[Tensor]:
    """The tensors in ``value``, in order, without those that were there before: the same object."""
    return list({id(tensor): tensor for tensor in tensors(value)}.values())


def map_distinct(function: Callable[[Tensor], Any], value: Nested) -> Nested:
    """As :func:`map_tensors`, but where the same tensor is met again so is what came of it."""
    made: dict[int, Any] = {}

    def once(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = function(tensor)
        return made[id(tensor)]

    return map_tensors(once, value)


def cloned(value: Nested) -> Nested:
    """A copy of ``value`` that shares no tensor and no container with it."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def leaf_of(tensor: Tensor) -> Tensor:
    """``tensor`` without its past, with a gradient if it could have one."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def moved(value: Nested, device: torch.device) -> Nested:
    """``value`` with its tensors on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), value)


def device_of(value: Nested) -> torch.device:
    """The device of the first tensor in ``value``."""
    return tensors(value)[0].device


def repacked(value: Nested) -> Nested:
    """``value``'s own tensors in new containers, which their taker may change."""
    return map_tensors(lambda tensor: tensor, value)


def sample_count(value: Nested) -> int:
    """The length of the first tensor in ``value`` that has a dimension; 0 if there is none."""
    return next((len(tensor) for tensor in tensors(value) if tensor.ndim > 0), 0)


def check_nested(value: Any, what: str) -> int:
    """How many samples ``value`` holds.

    Args:
        what: to call it in errors ("batch 3: the input").

    Raises:
        TypeError: there is no tensor in it, or something that is neither tensor nor plain.
        ValueError: it holds no samples.
    """
    stranger = stranger_in(value)
    if stranger is not None:
        raise TypeError(_not_understood(stranger, value, what))
    if not tensors(value):
        raise TypeError(
            f"{what} must be a tensor, or tuples, lists and dicts of tensors; got a "
            f"{type(value).__name__} without any tensor. torch.as_tensor converts numpy arrays and "
            f"lists."
        )
    count = sample_count(value)
    if count == 0:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(value))
        raise ValueError(f"{what} holds no samples (shape {shapes})")
    return count


def stranger_in(value: Any) -> Any:
    """The first thing in ``value`` that is neither tensor nor plain; None: there is none."""
    if isinstance(value, Tensor):
        return None
    leaves = pytree.tree_leaves(value)
    return next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))), None)


def _not_understood(leaf: Any, value: Any, what: str) -> str:
    kind = type(leaf).__name__
    got = f"got a {kind}" if leaf is value else f"there is a {kind} in it"
    if hasattr(leaf, "__array__"):
        remedy = "torch.as_tensor converts numpy arrays and lists."
    elif hasattr(leaf, "keys"):
        remedy = "Make it a plain dict in the loader's collate_fn: dict(batch)."
    else:
        remedy = (
            "Take its tensors out in the loader's collate_fn, or tell torch how to: "
            "torch.utils._pytree.register_pytree_node."
        )
    return f"{what} must be a tensor, or tuples, lists and dicts of tensors; {got}. {remedy}"
