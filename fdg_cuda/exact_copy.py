"""Copies that kernels compute the same bits with as with what was copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdg_cuda.forms import fills_memory
from fdg_cuda.hops import span_of

# Bytes. At another place within so many, and with other strides, a kernel may add up in another order.
ALIGNMENT = 64


def exact_copy(tensor: Tensor) -> Tensor:
    """``tensor.clone()``, but with its strides, gaps included, and as it is aligned."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return tensor.clone()
    if tensor.data_ptr() % ALIGNMENT == 0 and fills_memory(tensor):
        return tensor.clone()
    copy: Tensor = _ExactCopy.apply(tensor)  # type: ignore[no-untyped-call]
    return copy


class _ExactCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        begin, end = span_of(tensor)
        skipped = begin % ALIGNMENT // tensor.itemsize
        memory = tensor.new_empty(skipped + (end - begin) // tensor.itemsize)
        copy = memory.as_strided(tensor.shape, tensor.stride(), skipped)
        # Of an expanded dimension, once: one piece of memory cannot be written to as several.
        written = tuple(slice(None if step else 1) for step in tensor.stride())
        copy[written].copy_(tensor[written])
        return copy.data  # no view, so that layers may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient
