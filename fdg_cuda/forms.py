"""How nested values lie in one piece of memory: one tensor as it is, several one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fdg_cuda.hops import Errors
from fdg_cuda.nested import Nested, distinct, map_distinct, tensors

ALIGNMENT = 256  # bytes; that of CUDA's own allocations


@dataclass(frozen=True)
class Form:
    """How a tensor without gaps is laid out."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The beginning of ``memory`` (bytes) as a tensor of this form."""
        return memory[: self.nbytes].view(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class NestedForm:
    """How the tensors of a nested value lie one behind the other, and what they were in.

    Attributes:
        parts: (offset in bytes, form) of each tensor; of one that is met again, once.
        plain: (type, value) of everything else; the type, since ``1 == True``.
        structure: the containers.
        places: of each leaf of them, in order, which of ``parts`` it is; None: a plain one.
        nbytes: of all tensors and the gaps between them; at least 1 for each.
    """

    parts: tuple[tuple[int, Form], ...]
    plain: tuple[tuple[type, object], ...]
    structure: pytree.TreeSpec
    places: tuple[int | None, ...]
    nbytes: int

    @classmethod
    def of(cls, value: Nested) -> NestedForm:
        leaves, structure = pytree.tree_flatten(value)
        parts, nbytes = [], 0
        found = distinct(value)
        for tensor in found:
            form = Form.of(tensor)
            nbytes += -nbytes % ALIGNMENT
            parts.append((nbytes, form))
            # Never 0, so that fewer error signals of the same tensors always are fewer bytes.
            nbytes += max(form.nbytes, 1)
        numbers = {id(tensor): number for number, tensor in enumerate(found)}
        return cls(
            tuple(parts),
            tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor)),
            structure,
            tuple(numbers.get(id(leaf)) for leaf in leaves),
            nbytes,
        )

    def view(self, memory: Tensor) -> Nested:
        """The beginning of ``memory`` (bytes) as tensors, in containers of this structure."""
        parts = [form.view(memory[offset:]) for offset, form in self.parts]
        plain = (value for _, value in self.plain)
        leaves = [next(plain) if place is None else parts[place] for place in self.places]
        return pytree.tree_unflatten(leaves, self.structure)


AnyForm = Form | NestedForm


def form_of(value: Nested) -> AnyForm:
    """How ``value`` lies in memory; its tensors are without gaps."""
    return Form.of(value) if isinstance(value, Tensor) else NestedForm.of(value)


@dataclass(frozen=True)
class Parcel:
    """What one native copy brings to a neighbour, as far as it can be known before it is computed.

    Attributes:
        form: of what lies in it.
        wanting: of each of its tensors, whether it wants a gradient; empty for error signals.
    """

    form: AnyForm
    wanting: tuple[bool, ...] = ()

    @property
    def nbytes(self) -> int:
        """At least 1: 0 bytes are for nothing at all."""
        return max(self.form.nbytes, 1)

    @property
    def coming_back(self) -> Parcel:
        """The error signals for it, if there is one for each tensor that wants one."""
        forms = (
            [self.form] if isinstance(self.form, Form) else [form for _, form in self.form.parts]
        )
        errors = [
            torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
            if wanting
            else None
            for form, wanting in zip(forms, self.wanting, strict=True)
        ]
        return Parcel(form_of(_errors_as_value(errors)))


def packed(value: Nested) -> tuple[Tensor, AnyForm]:
    """Memory in which all of ``value`` lies, one tensor behind the other, and how. That of a single
    tensor is its own if it has no gaps."""
    source = map_distinct(without_gaps, value)
    form = form_of(source)
    found = distinct(source)
    if len(found) == 1 and found[0].numel():
        return found[0], form
    memory = torch.empty(max(form.nbytes, 1), dtype=torch.uint8, device=found[0].device)
    fill(form, memory, source)
    return memory, form


def parcel_of(output: Nested) -> tuple[Tensor, Parcel]:
    """Memory to send of ``output``, leaves for the stage above, and what it is."""
    sent, form = packed(output)
    return sent, Parcel(form, tuple(leaf.requires_grad for leaf in distinct(output)))


def packed_errors(errors: Errors, forms: Sequence[Form]) -> tuple[Tensor, AnyForm]:
    """:func:`packed` error signals, each laid out as its tensor's form says; one is not None."""
    laid = [
        None if error is None else laid_out_like(error, form)
        for error, form in zip(errors, forms, strict=True)
    ]
    return packed(_errors_as_value(laid))


def errors_in(memory: Tensor, form: AnyForm) -> Errors:
    """The error signals in ``memory`` (bytes), views of it."""
    value = form.view(memory)
    return [value] if isinstance(value, Tensor) else list(value)


def _errors_as_value(errors: Errors) -> Nested:
    return errors[0] if len(errors) == 1 else tuple(errors)


def without_gaps(tensor: Tensor) -> Tensor:
    """``tensor`` if its elements fill memory without gap, overlap or lazy sign; else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain if fills_memory(plain) else plain.contiguous()


def fills_memory(tensor: Tensor) -> bool:
    """Whether the elements of ``tensor`` lie one behind the other, in any order of its dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def laid_out_like(tensor: Tensor, form: Form) -> Tensor:
    """``tensor`` if it has ``form``'s strides; else a copy that has."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.stride() == form.stride and not plain._is_zerotensor():
        return plain
    laid = torch.empty_strided(form.shape, form.stride, dtype=plain.dtype, device=plain.device)
    return laid.copy_(plain)


def fill(form: AnyForm, memory: Tensor, source: Nested, *, non_blocking: bool = False) -> None:
    """Copy ``source``, which has ``form``, to the beginning of ``memory``."""
    for target, tensor in zip(distinct(form.view(memory)), distinct(source), strict=True):
        target.copy_(tensor, non_blocking=non_blocking)


def extent(value: Nested) -> tuple[int, int]:
    """Where what :meth:`Inbox.copy` returned lies: address and bytes."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.nbytes
    memory = tensors(value)[0].untyped_storage()
    return memory.data_ptr(), memory.nbytes()
