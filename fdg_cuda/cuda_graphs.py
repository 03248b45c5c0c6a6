"""Forward and backward of a CUDA stage as captured graphs, one of each per slot.

A graph's addresses are baked in, so every slot has graphs of its own: its weight copy, its input and
its activations. Every slot's forward has memory (a pool) of its own too: what it frees while it is
captured is free for any later capture of the same pool, and replaying that forward would then overwrite
what another slot's forward left for its backward, or an error signal that is still being sent. All
backwards of a stage share one pool: of what they leave, the update has read the gradients before the
next backward begins, and the next backward waits until the error signal was sent.

A stage that cannot be captured runs eagerly, with the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdg_cuda import _core
from fdg_cuda.accelerator import Graph, accelerator
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.cuda_stage import CudaStage
from fdg_cuda.errors import CaptureError, DeviceOutOfMemoryError
from fdg_cuda.forms import Form, Parcel, errors_in, extent, packed_errors, parcel_of
from fdg_cuda.graph_conditions import baked_in, place_in_model, why_not_captured
from fdg_cuda.hops import Errors, reached
from fdg_cuda.mail import addresses, word
from fdg_cuda.nested import Nested, distinct
from fdg_cuda.stage import Slot

logger = logging.getLogger("fdg_cuda")

# cuDNN and cuBLAS choose kernels and take workspaces in the first; the rest shows what stays.
WARM_UPS = 3

Intake = tuple[int, int, int, int]
Words = tuple[int, list[int]]


@dataclass
class SlotGraphs:
    """The graphs of one slot and the memory they read and write."""

    input: Nested
    target: Nested  # None but at the last stage
    roots: Sequence[Tensor] = ()  # keep the autograd graph, and with it the activations, alive
    # What goes up, and how; None at the last stage.
    sent: Tensor | None = None
    parcel: Parcel | None = None
    # Where the error signals are taken in, and what they are; None at the last stage.
    incoming: Tensor | None = None
    errors: Errors | None = None
    # Where the backward leaves its results, and what goes down. The tensors themselves are not kept,
    # so that the next slot's backward leaves its own in the same memory.
    gradients: Sequence[int] = ()
    address_down: int = 0
    parcel_down: Parcel | None = None
    forward: Graph | None = None
    backward: Graph | None = None


class StageGraphs:
    """The graphs of ``stage`` during one ``fit``, captured when a slot is first used."""

    def __init__(self, stage: CudaStage) -> None:
        self._stage = stage
        self._slots: dict[int, SlotGraphs] = {}
        self._forwards: dict[tuple[int, int], tuple[_core.CudaGraphWork, int]] = {}
        self._backwards: dict[tuple[int, int], _core.CudaGraphWork] = {}
        self._runs_eagerly = False
        self._warm = False
        self._draws_random_numbers = False
        self._circumstances: object = None
        # Where every slot's backward takes the error signals in: one is at work at a time.
        self._incoming: Tensor | None = None
        self._backward_pool: object = accelerator().graph_pool()

    # -- works ---------------------------------------------------------------------------------

    def forward(
        self, slot: int, copy: int, half: int, eager: Callable[[int], None]
    ) -> _core.CudaGraphWork:
        """The forward of ``slot`` for batches in inbox half ``half``."""
        work = self._graph_work(eager)
        self._forwards[slot, half] = work, copy
        self._prepare_later(work, slot, copy, half)
        return work

    def backward(self, slot: int, half: int, eager: Callable[[int], None]) -> _core.CudaGraphWork:
        """The backward of ``slot`` for error signals in inbox half ``half``."""
        work = self._graph_work(eager)
        self._backwards[slot, half] = work
        self._equip_later(work, slot, half)
        return work

    def close(self) -> None:
        """Let go of all graphs and their memory now, not when garbage is collected next."""
        self._drop()
        self._forwards.clear()
        self._backwards.clear()
        self._incoming = None

    def lend(self, slot: int, held: Slot) -> None:
        """Let a backward that is not replayed have what a replayed forward left in ``slot``: fewer
        error signals came than there are tensors that want one."""
        graphs = self._slots.get(slot)
        if graphs is not None and not held.roots:
            held.input, held.roots, held.lent = graphs.input, graphs.roots, True

    def begin_epoch(self) -> None:
        """Capture again if the layers are no longer what they were (modes, buffers, settings)."""
        now = baked_in(self._stage.layers)
        if now == self._circumstances:
            return
        self._circumstances = now
        self._runs_eagerly = False
        self._warm = False
        self._drop()
        self._backward_pool = accelerator().graph_pool()
        for (slot, half), (work, copy) in self._forwards.items():
            self._prepare_later(work, slot, copy, half)
        for (slot, half), work in self._backwards.items():
            self._equip_later(work, slot, half)

    def _drop(self) -> None:
        for work in (*(work for work, _ in self._forwards.values()), *self._backwards.values()):
            work.drop_graph()
            work.prepare_with(None)
        for graphs in self._slots.values():
            graphs.forward = graphs.backward = None
        self._slots.clear()

    def _graph_work(self, eager: Callable[[int], None]) -> _core.CudaGraphWork:
        regular = self._stage.fit.regular[self._stage.index]
        return _core.CudaGraphWork(
            eager=eager, regular=int(regular.ctypes.data), rows=self._stage.fit.rows
        )

    def _prepare_later(self, work: _core.CudaGraphWork, slot: int, copy: int, half: int) -> None:
        work.prepare_with(lambda batch: self._prepare(slot, copy, half, batch))

    def _equip_later(self, work: _core.CudaGraphWork, slot: int, half: int) -> None:
        work.prepare_with(lambda batch: self._equip_backward(slot, half))

    def _prepare(self, slot: int, copy: int, half: int, batch: int) -> None:
        """Before the first regular batch in ``slot`` and ``half``: its input has arrived."""
        if slot not in self._slots and not self._runs_eagerly:
            with self._stage.enqueuing():
                self._capture(slot, copy, batch)
        if slot in self._slots:
            self._equip_forward(slot, half)

    # -- what a work needs to replay ---------------------------------------------------------

    def _equip_forward(self, slot: int, half: int) -> None:
        stage, graphs = self._stage, self._slots[slot]
        assert graphs.forward is not None
        sent = 0 if stage.is_first else word(stage.mail.inbox.sent, half)[0]
        intakes = [_intake(word(stage.mail.inbox.address, half)[0], extent(graphs.input), sent)]
        if graphs.target is not None:
            source = word(stage.mail.targets.address, half)[0]
            intakes.append(_intake(source, extent(graphs.target), 0))
        words: list[Words] = []
        if stage.above is not None:
            assert graphs.sent is not None
            assert graphs.parcel is not None
            inbox = stage.above.mail.inbox
            inbox.reserve(half, graphs.parcel.nbytes)
            words = [
                (word(stage.mail.output_words, slot)[0], [graphs.sent.data_ptr()]),
                (word(inbox.sent, half)[0], [graphs.parcel.nbytes]),
                (word(inbox.by_graph, half)[0], [1]),
            ]
        self._use(self._forwards[slot, half][0], graphs.forward, intakes, words)

    def _equip_backward(self, slot: int, half: int) -> None:
        stage, graphs = self._stage, self._slots.get(slot)
        if graphs is None or graphs.backward is None:
            return
        intakes: list[Intake] = []
        if graphs.incoming is not None:
            inbox = stage.mail.errors
            source, sent = word(inbox.address, half)[0], word(inbox.sent, half)[0]
            intakes.append(_intake(source, extent(graphs.incoming), sent))
        row = stage.memory.gradient_table[slot]
        words: list[Words] = [(int(row.ctypes.data), list(graphs.gradients))]
        if stage.below is not None:
            errors, parcel = stage.below.mail.errors, graphs.parcel_down
            nbytes = 0 if parcel is None else parcel.nbytes
            words += [
                (word(errors.sent, half)[0], [nbytes]),
                (word(errors.by_graph, half)[0], [1]),
                (word(stage.mail.error_words, 0)[0], [graphs.address_down]),
            ]
            errors.reserve(half, nbytes)
        self._use(self._backwards[slot, half], graphs.backward, intakes, words)

    def _use(
        self,
        work: _core.CudaGraphWork,
        graph: Graph,
        intakes: list[Intake],
        words: list[Words],
    ) -> None:
        if not self._draws_random_numbers:
            work.use_graph(graph=graph.handle, replay=None, intakes=intakes, words=words)
            return

        # Only torch's own replay moves its generator on; without that every batch would get the
        # same random numbers.
        def replay(batch: int) -> None:
            with self._stage.enqueuing():
                graph.replay()

        work.use_graph(graph=0, replay=replay, intakes=intakes, words=words)

    # -- capturing -----------------------------------------------------------------------------

    def _capture(self, slot: int, copy: int, batch: int) -> None:
        stage = self._stage
        reason = why_not_captured(stage.layers)
        if reason is not None:
            self._run_eagerly(reason)
            return
        stage._sites.install(stage.memory.leaves[copy])
        graphs = SlotGraphs(
            input=stage._take_input(batch),
            target=stage.take_target(batch) if stage.is_last else None,
        )
        stage._target = graphs.target
        # Neither warm-up nor capture may show in what is trained.
        buffers = SavedBuffers(stage.layers)
        host_random, device_random = (
            torch.get_rng_state(),
            accelerator().random_state(stage.ordinal),
        )
        try:
            if not self._warm and not self._warm_up(graphs, copy, batch):
                self._run_eagerly("it has nothing to differentiate", expected=True)
                return
            self._capture_both(graphs, copy, batch)
            self._slots[slot] = graphs
        except CaptureError as error:
            graphs.forward = graphs.backward = None
            self._run_eagerly(str(error), cause=error.__cause__)
        finally:
            stage._target = None
            buffers.restore()
            torch.set_rng_state(host_random)
            accelerator().set_random_state(stage.ordinal, device_random)

    def _warm_up(self, graphs: SlotGraphs, copy: int, batch: int) -> bool:
        """Forward and backward on the stage's stream, eagerly. False if there is no backward."""
        stage = self._stage
        before = accelerator().random_state(stage.ordinal)
        for _ in range(WARM_UPS):
            roots, output = stage._compute(graphs.input, batch)
            if not any(root.requires_grad for root in roots):
                return False
            stage._check_leaves(roots, graphs.input, copy)
            if not stage.is_last:
                _, parcel = parcel_of(output)
                self._take_in(graphs, parcel)
            self._gradients(graphs, roots, graphs.errors, copy)
        after = accelerator().random_state(stage.ordinal)
        self._draws_random_numbers = not torch.equal(before, after)
        self._warm = True
        return True

    def _capture_both(self, graphs: SlotGraphs, copy: int, batch: int) -> None:
        stage = self._stage

        def forward() -> list[Tensor]:
            stage._sites.install(stage.memory.leaves[copy])
            stage._target = graphs.target
            graphs.roots, output = stage._compute(graphs.input, batch)
            if stage.is_last:
                return []
            sent, parcel = parcel_of(output)
            if graphs.sent is None:
                graphs.sent, graphs.parcel = sent, parcel
            return [sent]

        def backward() -> list[Tensor]:
            gradients, errors = self._gradients(graphs, graphs.roots, graphs.errors, copy)
            down = None
            if any(error is not None for error in errors):
                down, form = packed_errors(errors, list(map(Form.of, distinct(graphs.input))))
            if graphs.backward is None:
                graphs.gradients = addresses(gradients)
                if down is not None:
                    graphs.address_down, graphs.parcel_down = down.data_ptr(), Parcel(form)
            return [g for g in (*gradients, down) if g is not None]

        graphs.forward = self._captured("forward", accelerator().graph_pool(), forward)
        if stage.above is not None:
            assert graphs.parcel is not None
            if stage.above.mail.inbox.regular not in (None, graphs.parcel):
                raise CaptureError("its output changes its layout from batch to batch")
            stage.above.mail.inbox.regular = graphs.parcel
            self._take_in(graphs, graphs.parcel)
        graphs.backward = self._captured("backward", self._backward_pool, backward)
        if stage.below is not None and graphs.parcel_down is not None:
            stage.below.mail.errors.regular = graphs.parcel_down

    def _take_in(self, graphs: SlotGraphs, parcel: Parcel) -> None:
        """Make room for the error signals that come back for ``parcel``. If fewer come, which are
        fewer bytes, the backward is not replayed."""
        back = parcel.coming_back
        if self._incoming is None:
            device = self._stage.device
            self._incoming = torch.zeros(back.nbytes, dtype=torch.uint8, device=device)
        graphs.incoming = self._incoming
        graphs.errors = errors_in(self._incoming, back.form)

    def _captured(self, what: str, pool: object, function: Callable[[], list[Tensor]]) -> Graph:
        stage = self._stage
        try:
            return accelerator().capture(stage.ordinal, stage.lane, pool, function)
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CaptureError(
                f"its {what} cannot be captured: {first_line}{place_in_model(error)}"
            ) from error

    def _gradients(
        self, graphs: SlotGraphs, roots: Sequence[Tensor], errors: Errors | None, copy: int
    ) -> tuple[list[Tensor | None], Errors]:
        """Of the parameters, laid out as the update reads them, and of each tensor of the input.

        Args:
            errors: from which it starts; None: from the loss.
        """
        stage = self._stage
        leaves = stage.memory.leaves[copy]
        incoming = distinct(graphs.input)
        wanted = [leaf for leaf in incoming if leaf.requires_grad]
        outputs, signals = (roots, None) if errors is None else reached(roots, errors)
        found = torch.autograd.grad(
            outputs,
            [*leaves, *wanted],
            grad_outputs=signals,
            retain_graph=True,
            allow_unused=True,
        )
        gradients: list[Tensor | None] = [
            None if gradient is None else stage.memory.readable(gradient, leaf)
            for gradient, leaf in zip(found, leaves, strict=False)
        ]
        down = iter(found[len(leaves) :])
        return gradients, [next(down) if leaf.requires_grad else None for leaf in incoming]

    def _run_eagerly(
        self, reason: str, *, expected: bool = False, cause: BaseException | None = None
    ) -> None:
        stage = self._stage
        self._runs_eagerly = True
        if expected:
            logger.info("stage %d runs eagerly: %s", stage.index, reason)
            return
        if stage.fit.graphs == "always":
            if isinstance(cause, torch.OutOfMemoryError):
                raise DeviceOutOfMemoryError(stage.index, stage.ordinal, cause) from cause
            raise CaptureError(
                f"graphs=True, but stage {stage.index} cannot run as captured graphs: {reason}. "
                f"graphs='auto' runs such stages eagerly."
            ) from cause
        logger.warning("stage %d runs eagerly, which is slower: %s", stage.index, reason)


def _intake(source: int, target: tuple[int, int], sent: int) -> Intake:
    return source, *target, sent
