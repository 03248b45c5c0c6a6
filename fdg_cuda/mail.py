"""What CUDA stages send one another: memory that stays, and words that say what lies in it.

Native copies look their addresses and sizes up in *words* (uint64 in host memory) when they are
enqueued; see ``csrc/cuda/copy_work.h``. All of this is used by the one thread that enqueues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fdg_cuda.accelerator import Lane, accelerator
from fdg_cuda.hops import Errors
from fdg_cuda.layout import INBOX_HALVES
from fdg_cuda.nested import Nested, distinct, map_distinct, map_tensors, tensors

METRICS = 2  # float64: loss, correct answers (NaN where there are no classes)
ALIGNMENT = 256  # bytes; that of CUDA's own allocations

Word = tuple[int, int]  # address of the first word, and how many take turns with the batches


def word(words: np.ndarray, index: int) -> Word:
    """One of ``words``."""
    return int(words.ctypes.data) + index * words.itemsize, 1


def turns(words: np.ndarray) -> Word:
    """All of ``words``, taking turns with the batches."""
    return int(words.ctypes.data), len(words)


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
        nbytes: of all tensors and the gaps between them.
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
            nbytes += form.nbytes
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


def packed_errors(errors: Errors, forms: Sequence[Form]) -> tuple[Tensor, AnyForm]:
    """:func:`packed` error signals, each laid out as its tensor's form says; one is not None."""
    laid = [
        None if error is None else laid_out_like(error, form)
        for error, form in zip(errors, forms, strict=True)
    ]
    return packed(_errors_as_value(laid))


def form_of_errors(errors: Errors) -> AnyForm:
    """How :func:`packed_errors` would lay out ``errors``, which are without gaps."""
    return form_of(_errors_as_value(errors))


def errors_in(memory: Tensor, form: AnyForm) -> Errors:
    """The error signals in ``memory`` (bytes), views of it."""
    value = form.view(memory)
    return [value] if isinstance(value, Tensor) else list(value)


def _errors_as_value(errors: Errors) -> Nested:
    return errors[0] if len(errors) == 1 else tuple(errors)


def without_gaps(tensor: Tensor) -> Tensor:
    """``tensor`` if its elements fill memory without gap, overlap or lazy sign; else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if torch.empty_like(plain, device="meta").stride() == plain.stride():
        return plain
    return plain.contiguous()


def laid_out_like(tensor: Tensor, form: Form) -> Tensor:
    """``tensor`` if it has ``form``'s strides; else a copy that has."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.stride() == form.stride and not plain._is_zerotensor():
        return plain
    laid = torch.empty_strided(form.shape, form.stride, dtype=plain.dtype, device=plain.device)
    return laid.copy_(plain)


class Inbox:
    """Two halves of memory on a stage's device; batch b arrives in half b mod 2.

    Args:
        device: the receiving stage's.
        lane: a stream of that stage on which nothing else allocates.
        staged: whether what arrives is first put into pinned host memory.
    """

    def __init__(self, device: torch.device, lane: Lane, *, staged: bool = False) -> None:
        self._device = device
        self._lane = lane
        self._staged = staged
        self.address = np.zeros(INBOX_HALVES, dtype=np.uint64)
        self.pinned = np.zeros(INBOX_HALVES, dtype=np.uint64)
        # Bytes that were sent to each half; 0: nothing, no gradient is wanted.
        self.sent = np.zeros(INBOX_HALVES, dtype=np.uint64)
        # Whether a captured graph sent them, so that they are the regular parcel.
        self.by_graph = np.zeros(INBOX_HALVES, dtype=np.uint64)
        self.regular: Parcel | None = None
        # What the receiver's graphs take in, and as `sent`, but 0 for everything else.
        self.taken: Parcel | None = None
        self.fitting = np.zeros(INBOX_HALVES, dtype=np.uint64)
        self._parcels: list[Parcel | None] = [None] * INBOX_HALVES
        self._memory: list[Tensor | None] = [None] * INBOX_HALVES
        self._pinned: list[Tensor | None] = [None] * INBOX_HALVES
        self._replaced: list[Tensor | None] = []  # may still be read by what is in flight

    def reserve(self, half: int, nbytes: int) -> None:
        """Make room for ``nbytes`` in ``half``, when nothing in it is still to be read by what is
        not enqueued yet."""
        memory = self._memory[half]
        if memory is not None and memory.numel() >= nbytes:
            return
        self._replaced += [memory, self._pinned[half]]
        with accelerator().on(self._lane):
            memory = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._device)
        self._memory[half] = memory
        self.address[half] = memory.data_ptr()
        if self._staged:
            pinned = accelerator().pinned(max(nbytes, 1))
            self._pinned[half] = pinned
            self.pinned[half] = pinned.data_ptr()

    def expect(self, half: int, parcel: Parcel | None) -> None:
        """``parcel`` will be sent to ``half`` (None: nothing will)."""
        self._parcels[half] = parcel
        self.by_graph[half] = 0
        self.sent[half] = 0 if parcel is None else parcel.nbytes
        self.fitting[half] = self.bytes_that_fit(parcel)
        if parcel is not None:
            self.reserve(half, parcel.nbytes)

    def bytes_that_fit(self, parcel: Parcel | None) -> int:
        """The bytes of ``parcel`` if it is what the receiver's graphs take in, else 0."""
        return parcel.nbytes if parcel is not None and parcel == self.taken else 0

    def parcel(self, half: int) -> Parcel | None:
        """What was sent to ``half``; None for nothing."""
        if not self.sent[half]:
            return None
        return self.regular if self.by_graph[half] else self._parcels[half]

    def view(self, half: int, form: AnyForm) -> Nested:
        """What is in ``half``; it will be overwritten by what arrives there next."""
        memory = self._memory[half]
        assert memory is not None, "nothing was ever sent"
        return form.view(memory)

    def copy(self, half: int, form: AnyForm) -> Nested:
        """A copy of what is in ``half``. Nested tensors are views of one piece of memory again."""
        if isinstance(form, Form):
            return self.view(half, form).clone()
        return form.view(self.bytes(half, form))

    def bytes(self, half: int, form: AnyForm) -> Tensor:
        """A copy of the bytes of what is in ``half``."""
        memory = self._memory[half]
        assert memory is not None, "nothing was ever sent"
        return memory[: max(form.nbytes, 1)].clone()

    def forget(self) -> None:
        """Let go of memory that was replaced. Only while nothing is running."""
        self._replaced.clear()


class Mailbox:
    """What one stage gets and gives during one ``fit``.

    Args:
        device, lane: as for its inboxes.
        slots: of the stage.
        staged_below, staged_above: whether the hop goes through pinned host memory.

    Attributes:
        inbox: activations from below; at stage 0 the inputs.
        errors: error signals from above.
        targets: at the last stage.
        outputs, output_words: per slot, on its way up; several tensors are packed.
        error, error_words: the latest error signals, on their way down, packed as well.
        metrics, metrics_words: float64 (METRICS,) of the batch whose loss was computed last.
    """

    def __init__(
        self,
        device: torch.device,
        lane: Lane,
        slots: int,
        *,
        staged_below: bool,
        staged_above: bool,
    ) -> None:
        self.inbox = Inbox(device, lane, staged=staged_below)
        self.errors = Inbox(device, lane, staged=staged_above)
        self.targets = Inbox(device, lane)
        self.outputs: list[Tensor | None] = [None] * slots
        self.output_words = np.zeros(slots, dtype=np.uint64)
        self.error: Tensor | None = None
        self.error_words = np.zeros(1, dtype=np.uint64)
        self.metrics = torch.zeros(METRICS, dtype=torch.float64, device=device)
        self.metrics_words = np.array([self.metrics.data_ptr(), self.metrics.nbytes], np.uint64)

    def forget(self) -> None:
        """Let go of what was sent. Only while nothing is running."""
        self.outputs = [None] * len(self.outputs)
        self.error = None
        for inbox in (self.inbox, self.errors, self.targets):
            inbox.forget()


class Outbox:
    """Pinned host memory for what enters the pipeline, a row per batch on its way.

    Args:
        rows: after so many batches a row is written anew; by then its batch was copied.
    """

    def __init__(self, rows: int) -> None:
        self.address = np.zeros(rows, dtype=np.uint64)
        self.nbytes = np.zeros(rows, dtype=np.uint64)
        self._rows = rows
        self._forms: list[AnyForm | None] = [None] * rows
        self._memory: list[Tensor | None] = [None] * rows

    def put(self, batch: int, value: Nested) -> AnyForm:
        """Copy ``value`` to the row of ``batch``; returns how it is laid out there."""
        row = batch % self._rows
        source = map_tensors(without_gaps, value)
        form = form_of(source)
        memory = self._memory[row]
        if memory is None or memory.numel() < form.nbytes:
            memory = accelerator().pinned(form.nbytes)
            self._memory[row] = memory
            self.address[row] = memory.data_ptr()
        fill(form, memory, source)
        self._forms[row] = form
        self.nbytes[row] = form.nbytes
        return form

    def form(self, batch: int) -> AnyForm:
        """How ``batch`` is laid out."""
        form = self._forms[batch % self._rows]
        assert form is not None, f"batch {batch} did not enter"
        return form


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


def addresses(all_tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor lies; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in all_tensors]
