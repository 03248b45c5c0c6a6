"""What goes from a stage to its neighbours: tensors up, and of each that wants one a gradient down.

A hop carries a nested value. What is said of each of its tensors (which want a gradient, error signals)
is in the order of :func:`fdg_cuda.nested.distinct`: a tensor that stands in it twice is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from fdg_cuda.nested import Nested, distinct, map_distinct

# The error signal of each tensor of a hop; None where the loss does not depend on it.
Errors = Sequence[Tensor | None]

# Numbers of two tensors of a hop, the lower one first.
Pairs = frozenset[tuple[int, int]]


def leaves_of(output: Nested, own: frozenset[int], wanting: Callable[[Tensor], bool]) -> Nested:
    """``output`` of a stage as the stage above takes it: leaves of its graph.

    Their memory is the sender's, which must not change it while the stages above, and those it is
    handed through to, hold it. So what lies in weights or buffers is copied.

    Args:
        own: the :func:`storages` of the sender's weights and buffers.
        wanting: which of its tensors want a gradient.
    """

    def leaf(tensor: Tensor) -> Tensor:
        return _not_of(own, tensor.detach()).requires_grad_(wanting(tensor))

    return map_distinct(leaf, output)


def without_own(output: Nested, own: frozenset[int]) -> Nested:
    """``output`` with copies of what lies in ``own``, the :func:`storages` of a stage's buffers."""
    return map_distinct(lambda tensor: _not_of(own, tensor), output)


def _not_of(own: frozenset[int], tensor: Tensor) -> Tensor:
    return tensor.clone() if _storage(tensor) in own else tensor


def wants_gradient(tensor: Tensor) -> bool:
    """Whether an error signal can be computed for ``tensor``."""
    return tensor.is_floating_point() or tensor.is_complex()


def take_gradients(leaves: Sequence[Tensor]) -> Errors | None:
    """The gradients of ``leaves``, which do not have them any more; None: there is none."""
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return None if all(gradient is None for gradient in gradients) else gradients


def reached(outputs: Sequence[Tensor], errors: Errors) -> tuple[list[Tensor], list[Tensor]]:
    """Those of a stage's ``outputs`` that a backward starts from, each with its error signal."""
    pairs = [
        (output, error)
        for output, error in zip(outputs, errors, strict=True)
        if output.requires_grad and error is not None
    ]
    return [output for output, _ in pairs], [error for _, error in pairs]


# -- memory that several tensors share ------------------------------------------------------------


def storages(found: Iterable[Tensor]) -> frozenset[int]:
    """Where the memory of ``found`` begins."""
    return frozenset(map(_storage, found)) - {0}


def overlapping(hop: Nested, taken: Sequence[Tensor] = (), known: Pairs = frozenset()) -> Pairs:
    """Which tensors of ``hop`` lie in memory in which another of them lies too, here or where they come
    from.

    Args:
        taken: what the sender's layers took in: copies of their own, perhaps.
        known: which of those overlap where they come from.
    """
    spans = [span_of(tensor) for tensor in distinct(hop)]
    sources = [span_of(tensor) for tensor in taken]
    origins = [
        [number for number, source in enumerate(sources) if _meet(span, source)] for span in spans
    ]
    return frozenset(
        (one, other)
        for one, other in combinations(range(len(spans)), 2)
        if _meet(spans[one], spans[other])
        or any((min(pair), max(pair)) in known for pair in product(origins[one], origins[other]))
    )


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _storage(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` begins; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Of its elements: the first address, and the one behind the last."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * step for size, step in steps)
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
