"""What CUDA stages send one another: memory that stays, and words that say what lies in it.

Native copies look their addresses and sizes up in *words* (uint64 in host memory) when they are
enqueued; see ``csrc/cuda/copy_work.h``. All of this is used by the one thread that enqueues.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fdg_cuda.accelerator import Lane, accelerator
from fdg_cuda.forms import AnyForm, Form, Parcel, fill, form_of, without_gaps
from fdg_cuda.layout import INBOX_HALVES
from fdg_cuda.nested import Nested, map_distinct, map_tensors

METRICS = 2  # float64: loss, correct answers (NaN where there are no classes)

Word = tuple[int, int]  # address of the first word, and how many take turns with the batches


def word(words: np.ndarray, index: int) -> Word:
    """One of ``words``."""
    return int(words.ctypes.data) + index * words.itemsize, 1


def turns(words: np.ndarray) -> Word:
    """All of ``words``, taking turns with the batches."""
    return int(words.ctypes.data), len(words)


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
        if parcel is not None:
            self.reserve(half, parcel.nbytes)

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
        """A copy of what is in ``half``. Nested tensors lie in one piece of memory again."""
        if isinstance(form, Form):
            return self.view(half, form).clone()
        # Not as views of it: what changes one of them in place must not seem to change them all.
        return map_distinct(lambda view: view.data, form.view(self.bytes(half, form)))

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


def addresses(all_tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor lies; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in all_tensors]
