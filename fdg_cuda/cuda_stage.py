"""A stage on a CUDA device: mail is copied natively between memory that stays.

All of this runs on the one thread that enqueues, in the order of enqueuing. What a copy stream still
reads must not be given back to torch's allocator, which knows nothing of that stream: outputs stay
in their slot until the slot's backward, an error signal until the next one, and by then the compute
stream waits for their copies (``fdg_cuda/layout.py`` says who waits for what).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from fdg_cuda import _core
from fdg_cuda._core import Work
from fdg_cuda.accelerator import Lane, accelerator
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.chain import check_loss
from fdg_cuda.cuda_fit import CudaFit
from fdg_cuda.errors import said_out_of_memory
from fdg_cuda.flat import DTYPES
from fdg_cuda.forms import Form, Parcel, errors_in, packed_errors, parcel_of
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hops import Errors, take_gradients
from fdg_cuda.layout import INBOX_HALVES, CudaLayout, Step, Transfer
from fdg_cuda.mail import Inbox, Mailbox, Outbox, turns, word
from fdg_cuda.metrics import correct_on_device
from fdg_cuda.nested import Nested, distinct, repacked
from fdg_cuda.precision import Precision
from fdg_cuda.randomness import RandomState
from fdg_cuda.schedule import Kind
from fdg_cuda.stage import Snapshot, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdg_cuda.cuda_graphs import StageGraphs

logger = logging.getLogger("fdg_cuda")


class CudaStage(Stage):
    """Its forward, backward and update are enqueued on its own compute stream.

    Args:
        ordinal: of its device.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[nn.Module],
        slots: int,
        *,
        mode: BackwardWeights,
        rule: UpdateRule,
        precision: Precision,
        ordinal: int,
    ) -> None:
        self.ordinal = ordinal
        device = accelerator().device(ordinal)
        with said_out_of_memory(index, ordinal):
            for layer in layers:
                layer.to(device)
            super().__init__(
                index, layers, slots, mode=mode, rule=rule, precision=precision, device=device
            )
        # Wiring, set by the machine.
        self.above: CudaStage | None = None
        self._below: ReferenceType[CudaStage] | None = None
        self._fit: CudaFit | None = None
        self._mail: Mailbox | None = None
        self._sgd: _core.CudaSgd | None = None
        self._graphs: StageGraphs | None = None
        self._target: Nested = None  # of the batch whose loss is computed

    # -- on the caller's thread, with nothing running ------------------------------------------

    def begin_fit(self, fit: CudaFit) -> None:
        """Lay the parameters out anew if they changed; make inboxes and the native update."""
        from fdg_cuda.cuda_graphs import StageGraphs

        with said_out_of_memory(self.index, self.ordinal):
            for layer in self.layers:
                layer.to(self.device)
            self.lay_out_anew()
            self._fit = fit
            self._mail = Mailbox(
                self.device,
                fit.lanes[CudaLayout.receive(self.index)],
                len(self._slots),
                staged_below=not self.is_first and fit.staged[self.index - 1],
                staged_above=not self.is_last and fit.staged[self.index],
            )
            options = self._updates.begin_fit(fit.hyper)
            if self.memory.parameters and self._updates.native:
                self._sgd = _core.CudaSgd(
                    **self.memory.addresses(fit.hyper.table, **options),
                    gradient_dtype=DTYPES[self.memory.dtype],
                    device=self.ordinal,
                    slots=len(self._slots),
                    ticks_in_flight=fit.ticks_in_flight,
                )
        self.loss = self._loss
        self._graphs = None if fit.graphs == "never" or self.replays else StageGraphs(self)

    def end_fit(self) -> None:
        super().end_fit()
        self._sgd = None
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = None
        self._fit = self._mail = self._target = None

    def begin_epoch(self, first_slot: int, first_batch: int) -> None:
        with said_out_of_memory(self.index, self.ordinal):
            super().begin_epoch(first_slot, first_batch)
        if self._graphs is not None:
            self._graphs.begin_epoch()

    def end_epoch(self) -> None:
        super().end_epoch()
        self._target = None
        self.mail.forget()

    def random_state(self) -> RandomState:
        return torch.get_rng_state(), accelerator().random_state(self.ordinal)

    def set_random_state(self, state: RandomState) -> None:
        host, device = state
        torch.set_rng_state(host)
        accelerator().set_random_state(self.ordinal, device)

    @property
    def below(self) -> CudaStage | None:
        """The stage below. Referenced weakly, or device memory would wait for the garbage
        collector."""
        return None if self._below is None else self._below()

    @below.setter
    def below(self, stage: CudaStage | None) -> None:
        self._below = None if stage is None else ref(stage)

    def optimizer_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        copies = super().optimizer_state()
        # An optimizer may let go of what was copied, which the stage's stream would then use anew
        # without waiting for the stream that copies.
        accelerator().synchronize(self.ordinal)
        return copies

    def snapshot(self) -> Snapshot:
        with said_out_of_memory(self.index, self.ordinal):
            return super().snapshot()

    @property
    def fit(self) -> CudaFit:
        """The running fit."""
        assert self._fit is not None, "begin_fit comes first"
        return self._fit

    @property
    def mail(self) -> Mailbox:
        """What the stage gets and gives in the running fit."""
        assert self._mail is not None, "begin_fit comes first"
        return self._mail

    @property
    def is_first(self) -> bool:
        return self._below is None

    @property
    def lane(self) -> Lane:
        """The compute stream, as torch knows it."""
        return self.fit.lanes[CudaLayout.compute(self.index)]

    # -- works -----------------------------------------------------------------------------------

    def work(self, step: Step) -> Callable[[int], None] | Work | None:
        slot, half = step.slot, step.half
        copy = slot if self._stash else 0
        fit, mail = self.fit, self.mail
        match step.kind:
            case Kind.FORWARD:
                eager = partial(self._enqueue_forward, slot, copy)
                return self._graphs.forward(slot, copy, half, eager) if self._graphs else eager
            case Kind.BACKWARD:
                eager = partial(self._enqueue_backward, slot, copy)
                return self._graphs.backward(slot, half, eager) if self._graphs else eager
            case Kind.COPY_WEIGHTS:
                if not self._stash or not self.memory.parameters:
                    return None
                if self._sgd is None:
                    return partial(self._enqueue_copy, step.source, slot)
                return self._sgd.copy(step.source, slot)
            case Kind.UPDATE:
                source = step.source if self._stash else 0
                if self._updates.in_python and self.memory.parameters:
                    return partial(self._enqueue_update, source, copy, slot)
                return self._sgd.update(source, copy, slot) if self._sgd else None
            case Kind.SEND_ACTIVATION:
                above = self.above
                assert above is not None
                return self._send(word(mail.output_words, slot), above, above.mail.inbox, half)
            case Kind.SEND_ERROR:
                below = self.below
                assert below is not None
                return self._send(word(mail.error_words, 0), below, below.mail.errors, half)
            case Transfer.RECEIVE_ACTIVATION:
                return self._receive(mail.inbox, half)
            case Transfer.RECEIVE_ERROR:
                return self._receive(mail.errors, half)
            case Transfer.LOAD_INPUT:
                return self._load(fit.inputs, mail.inbox, half)
            case Transfer.LOAD_TARGET:
                return self._load(fit.targets, mail.targets, half)
            case Transfer.READ_METRICS:
                return _core.CudaCopy(
                    source=word(mail.metrics_words, 0),
                    source_device=self.ordinal,
                    target=turns(fit.result_addresses),
                    target_device=_core.CUDA_HOST,
                    bytes=word(mail.metrics_words, 1),
                )

    def _send(self, source: tuple[int, int], to: CudaStage, inbox: Inbox, half: int) -> Work:
        staged = fit_hop_is_staged(self, to)
        return _core.CudaCopy(
            source=source,
            source_device=self.ordinal,
            target=word(inbox.pinned if staged else inbox.address, half),
            target_device=_core.CUDA_HOST if staged else to.ordinal,
            bytes=word(inbox.sent, half),
        )

    def _receive(self, inbox: Inbox, half: int) -> Work:
        return _core.CudaCopy(
            source=word(inbox.pinned, half),
            source_device=_core.CUDA_HOST,
            target=word(inbox.address, half),
            target_device=self.ordinal,
            bytes=word(inbox.sent, half),
        )

    def _load(self, outbox: Outbox, inbox: Inbox, half: int) -> Work:
        return _core.CudaCopy(
            source=turns(outbox.address),
            source_device=_core.CUDA_HOST,
            target=word(inbox.address, half),
            target_device=self.ordinal,
            bytes=turns(outbox.nbytes),
        )

    # -- enqueuing on the compute stream ---------------------------------------------------------

    @contextmanager
    def enqueuing(self) -> Iterator[None]:
        """Within it torch works for this stage, whatever the caller of ``fit`` has set."""
        with (
            said_out_of_memory(self.index, self.ordinal),
            accelerator().on(self.lane),
            torch.enable_grad(),
        ):
            yield

    def _enqueue_forward(self, slot: int, copy: int, batch: int) -> None:
        with self.enqueuing():
            if self.is_last:
                self._target = self.take_target(batch)
            self._forward(slot, copy, batch)
            self._target = None

    def _enqueue_backward(self, slot: int, copy: int, batch: int) -> None:
        with self.enqueuing():
            if self._graphs is not None:
                self._graphs.lend(slot, self._slots[slot])
            self._backward(slot, copy, batch, slot)

    def _enqueue_update(self, source: int, copy: int, row: int, batch: int) -> None:
        with self.enqueuing():
            self._update(source, copy, row, batch)

    def _enqueue_copy(self, source: int, copy: int, batch: int) -> None:
        with self.enqueuing():
            self._copy_weights(source, copy, batch)

    def _update_natively(self, source: int, copy: int, row: int, batch: int) -> None:
        assert self._sgd is not None
        stream = self.fit.handles[CudaLayout.compute(self.index)]
        self._sgd.run_update(source=source, target=copy, slot=row, batch=batch, stream=stream)

    def take_target(self, batch: int) -> Nested:
        """A copy of the labels of ``batch``: the inbox is written again before the backward."""
        half = batch % INBOX_HALVES
        return self.mail.targets.copy(half, self.fit.targets.form(batch))

    def _take_input(self, batch: int) -> Nested:
        half = batch % INBOX_HALVES
        if self.is_first:
            return self.mail.inbox.copy(half, self.fit.inputs.form(batch))
        parcel = self.mail.inbox.parcel(half)
        assert parcel is not None, f"no activation of batch {batch} at stage {self.index}"
        leaves = self.mail.inbox.copy(half, parcel.form)
        for leaf, wanting in zip(distinct(leaves), parcel.wanting, strict=True):
            leaf.requires_grad_(wanting)
        return leaves

    def _take_errors(self, batch: int) -> Errors | None:
        # A copy: gradients may be views of it, and the inbox is written again before the update.
        half = batch % INBOX_HALVES
        parcel = self.mail.errors.parcel(half)
        if parcel is None:
            return None
        return errors_in(self.mail.errors.bytes(half, parcel.form), parcel.form)

    def _pass_up(self, slot: int, batch: int, output: Nested) -> None:
        assert self.above is not None
        sent, parcel = parcel_of(output)
        self.mail.outputs[slot] = sent
        self.mail.output_words[slot] = sent.data_ptr()
        self.above.mail.inbox.expect(batch % INBOX_HALVES, parcel)
        self._tell_if_regular(batch, parcel)

    def _tell_if_regular(self, batch: int, parcel: Parcel) -> None:
        """Stages above replay graphs only for what looks as it did when they were captured."""
        assert self.above is not None
        row = batch % self.fit.rows
        if not self.fit.regular[self.index, row]:
            return
        if self.above.mail.inbox.regular is None:
            self.above.mail.inbox.regular = parcel
        elif self.above.mail.inbox.regular != parcel:
            self.fit.regular[self.index + 1 :, row] = 0

    def _pass_down(self, batch: int, leaves: Sequence[Tensor]) -> None:
        assert self.below is not None
        errors = take_gradients(leaves)
        parcel = None
        if errors is not None:
            self.mail.error, form = packed_errors(errors, list(map(Form.of, leaves)))
            self.mail.error_words[0] = self.mail.error.data_ptr()
            parcel = Parcel(form)
        self.below.mail.errors.expect(batch % INBOX_HALVES, parcel)

    def _loss(self, output: Nested, batch: int) -> Tensor:
        """The loss of ``output``, which goes to the metrics too."""
        # New containers: warming up and capturing a graph compute the loss of one target again.
        target = repacked(self._target)
        loss = check_loss(self.fit.loss_fn(output, target), self._first_batch + batch)
        correct = correct_on_device(output, self._target, self.device)
        self.mail.metrics.copy_(torch.stack([loss.detach().double().reshape(()), correct]))
        return loss


def fit_hop_is_staged(one: CudaStage, other: CudaStage) -> bool:
    """Whether what goes between two neighbours passes through pinned host memory."""
    return one.fit.staged[min(one.index, other.index)]
