"""One stage: its layers, the slots that hold its batches in flight, its forward and backward.

What differs between kinds of devices (how mail travels, on which stream things run) is in the
subclasses: :mod:`fdg_cuda.cpu_stage` and :mod:`fdg_cuda.cuda_stage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda._core import Work
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.chain import check_output
from fdg_cuda.errors import AliasedParameterError, said_where
from fdg_cuda.flat import FlatMemory
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hops import Errors, leaves_of, overlapping, reached, storages
from fdg_cuda.in_place import InputGuard, Lent
from fdg_cuda.layout import Step
from fdg_cuda.nested import Nested, distinct
from fdg_cuda.parameter_sites import ParameterSites, graph_leaves
from fdg_cuda.precision import Precision
from fdg_cuda.randomness import RandomState
from fdg_cuda.stage_optimizer import State
from fdg_cuda.stage_updates import StageUpdates
from fdg_cuda.update_measures import UpdateMeasures

# Gives (output, batch) of the last stage to whoever computes the loss; returns the scalar loss.
LossOfBatch = Callable[[Nested, int], Tensor]


@dataclass
class Slot:
    """One batch between its forward and its backward."""

    # Leaves whose gradients are the error signals for the stage below; at stage 0 what entered.
    input: Nested = None
    roots: Sequence[Tensor] = ()  # the stage's outputs; at the last stage the loss
    random_state: RandomState = ()  # with which the forward began, if it will be run again
    lent: bool = False  # whether the graph is somebody else's, who needs it again


@dataclass(frozen=True)
class Snapshot:
    """A stage's whole training state at a drained point."""

    weights: Tensor
    optimizer: list[dict[str, Any]]  # per parameter
    buffers: SavedBuffers


class Stage(ABC):
    """Stage ``index`` of a runner. Its work is enqueued or run one action at a time.

    Args:
        index: the stage's number.
        layers: its part of the chain.
        slots: batches it holds at once.
        mode: which weights a backward uses.
        rule: how it comes from gradients to an update.
        precision: in which forward and loss compute.
        device: where its parameters, activations and gradients lie.

    Attributes:
        replays: whether its backward runs the forward again.
        guard: of what it takes in.
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
        device: torch.device,
    ) -> None:
        self.index = index
        self.layers = list(layers)
        self.device = device
        self._slots = [Slot() for _ in range(slots)]
        self._stash = mode.copy_per_slot
        self.precision = precision
        self._copies = slots if self._stash else 1
        self.replays = mode.replays(slots)
        self.memory = self._lay_out()
        self._sites = ParameterSites(self.layers, self.memory.parameters)
        self._updates = StageUpdates(self.memory, index, rule)
        self.guard = InputGuard(index)
        self._own_memory: frozenset[int] | None = None  # of weights and buffers, in this segment
        self._leaves_checked = False
        self._first_batch = 0
        self.above: Stage | None = None  # set by the machine
        self.loss: LossOfBatch | None = None  # of the last stage, set by the pipeline

    @property
    def is_last(self) -> bool:
        """Whether no stage is above this one."""
        return self.above is None

    # -- on the caller's thread, with nothing running ------------------------------------------

    def lay_out_anew(self) -> None:
        """For a new ``fit``: lay the parameters out anew if they changed."""
        trainable = self._trainable()
        if not self.memory.matches(trainable):
            self.memory = self._lay_out()
            self._updates.follow(self.memory)
        # Anew each time: a layer may keep a parameter elsewhere than before (parametrizations).
        self._sites = ParameterSites(self.layers, self.memory.parameters)
        self.guard.forget()

    def measure_updates(self, measures: UpdateMeasures) -> None:
        """Measure updates of this ``fit``, of which none was enqueued yet."""
        self._updates.measure(measures)

    def optimizer_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the optimizer remembers of each parameter it has updated, frozen ones included: copies
        of tensors, and plain values. Of the fused SGD that is ``momentum_buffer``, of the parameter's
        shape; of others what their ``state`` holds."""
        return self._updates.state(self._parameters())

    def load_optimizer_state(self, state: Mapping[nn.Parameter, State]) -> None:
        """Go on from what :meth:`optimizer_state` returned, for parameters of this stage.

        Raises:
            ValueError: a parameter is not this stage's, or the state is another optimizer's.
        """
        own = {id(parameter) for parameter in self._parameters()}
        strangers = sum(id(parameter) not in own for parameter in state)
        if strangers:
            raise ValueError(
                f"{strangers} of the {len(state)} parameters of which there is a state are not in "
                f"stage {self.index}"
            )
        self._updates.load(state)

    def end_fit(self) -> None:
        """Let go of what only a running ``fit`` needs."""
        self.loss = None
        self._updates.end_fit()

    def begin_epoch(self, first_slot: int, first_batch: int) -> None:
        """Take the caller's weights into the slot that is forwarded first. The actions' batches
        count from ``first_batch`` of the epoch, which matters to error messages only.

        Raises:
            RuntimeError: parameters were frozen, thawed or replaced since ``fit`` began.
        """
        if not self.memory.matches(self._trainable()):
            raise RuntimeError(
                f"the trainable parameters of stage {self.index} changed while fit was running; "
                f"freeze, thaw or replace parameters between two calls of fit"
            )
        self.memory.adopt()
        self.memory.make_newest(first_slot if self._stash else 0)
        for parameter in self.memory.parameters:
            parameter.grad = None
        if self._updates.gradients is not None:
            self._updates.gradients.forget()
        self._leaves_checked = False
        self._own_memory = None
        self._first_batch = first_batch

    def end_epoch(self) -> None:
        """Give the newest weights to the caller's parameters and let go of all batches."""
        self._sites.install(self.memory.parameters)
        self.memory.publish()
        self.memory.release_gradients()
        for slot in self._slots:
            slot.input, slot.roots = None, ()
            slot.random_state = ()

    def snapshot(self) -> Snapshot:
        """Copies of the newest weights, the optimizer's state and the modules' buffers."""
        return Snapshot(
            self.memory.newest_weights.clone(),
            self._updates.snapshot(),
            SavedBuffers(self.layers),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``."""
        self.memory.newest_weights.copy_(snapshot.weights)
        self._updates.restore(snapshot.optimizer)
        snapshot.buffers.restore()

    def _lay_out(self) -> FlatMemory:
        return FlatMemory(
            self._trainable(),
            self._copies,
            self.index,
            self.device,
            gradient_rows=len(self._slots),
        )

    def _parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for layer in self.layers for p in layer.parameters()}.values())

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    # -- for the subclasses ---------------------------------------------------------------------

    @abstractmethod
    def random_state(self) -> RandomState:
        """Where the generators that the stage's layers draw from stand. In its own turn only."""

    @abstractmethod
    def set_random_state(self, state: RandomState) -> None:
        """Go on from ``state``, which :meth:`random_state` gave."""

    @abstractmethod
    def work(self, step: Step) -> Callable[[int], None] | Work | None:
        """The work of ``step``, to be called with the batch's number within the epoch."""

    @property
    @abstractmethod
    def is_first(self) -> bool:
        """Whether no stage is below this one."""

    @abstractmethod
    def _take_input(self, batch: int) -> Nested:
        """What the stage below sent, leaves of this stage's graph; or what entered."""

    @abstractmethod
    def _take_errors(self, batch: int) -> Errors | None:
        """The error signals the stage above sent; None if it depends on nothing here."""

    @abstractmethod
    def _pass_up(self, slot: int, batch: int, output: Nested) -> None:
        """Make ``output``, leaves for the stage above, ready to be sent."""

    @abstractmethod
    def _update_natively(self, source: int, copy: int, row: int, batch: int) -> None:
        """The fused update, now; see :meth:`StageUpdates.run`."""

    @abstractmethod
    def _pass_down(self, batch: int, leaves: Sequence[Tensor]) -> None:
        """Make the gradients of the stage's input ``leaves`` ready to be sent."""

    # -- the stage's computations -----------------------------------------------------------

    def _forward(self, slot: int, copy: int, batch: int) -> None:
        self._sites.install(self.memory.leaves[copy])
        leaf = self._take_input(batch)
        held = self._slots[slot]
        held.input = leaf
        if self.replays:
            held.random_state = self.random_state()
            with torch.no_grad():
                _, output = self._compute(leaf, batch)
        else:
            held.roots, output = self._compute(leaf, batch)
        if not self.is_last:
            self._pass_up(slot, batch, output)
        if not self.replays:
            self._check_leaves_once(held.roots, leaf, copy)

    def _forward_again(
        self, leaf: Nested, copy: int, batch: int, random_state: RandomState
    ) -> Sequence[Tensor]:
        """The graph of a batch that was forwarded without one: with the weights of the moment, but
        the random numbers of its forward. Buffers stay as they are: they moved back then.
        """
        buffers, present = SavedBuffers(self.layers), self.random_state()
        self.set_random_state(random_state)
        try:
            roots, _ = self._compute(leaf, batch)
        finally:
            self.set_random_state(present)
            buffers.restore()
        self._check_leaves_once(roots, leaf, copy)
        return roots

    def _compute(self, leaf: Nested, batch: int) -> tuple[Sequence[Tensor], Nested]:
        """What a backward starts from (at the last stage the loss), and what goes up (from there
        nothing)."""
        with self.guard.lent(leaf, self._first_batch + batch) as lent:
            output = self._run_layers(lent.value, batch)
            if self.is_last:
                return [self._loss_of(output, batch)], None
        return distinct(output), self._to_send(output, lent)

    def _to_send(self, output: Nested, lent: Lent) -> Nested:
        if self._own_memory is None:
            weights = (leaf for copy in self.memory.leaves for leaf in copy)
            buffers = (buffer for layer in self.layers for buffer in layer.buffers())
            self._own_memory = storages(weights) | storages(buffers)
            assert self.above is not None
            # What the guard copied, or what was packed on its way, does not overlap any more.
            known = self.guard.overlapping | overlapping(lent.sources)
            self.above.guard.overlapping = overlapping(output, lent.tensors, known)
        wanting = lent.may_depend if self.replays else _wants_gradient
        return leaves_of(output, self._own_memory, wanting)

    def _run_layers(self, value: Nested, batch: int) -> Nested:
        autocast = self.precision.autocast(self.device.type)
        with said_where(f"the forward of {self._named(batch)}"), autocast:
            for layer in self.layers:
                value = layer(value)
            return check_output(value, f"stage {self.index}")

    def _loss_of(self, output: Nested, batch: int) -> Tensor:
        assert self.loss is not None
        autocast = self.precision.autocast(self.device.type)
        with said_where(f"the loss of batch {self._first_batch + batch}"), autocast:
            return self.loss(output, batch)

    def _backward(self, slot: int, copy: int, batch: int, row: int = 0) -> None:
        held = self._slots[slot]
        leaf, roots, random_state = held.input, held.roots, held.random_state
        held.input, held.roots = None, ()
        held.random_state = ()
        lent, held.lent = held.lent, False
        # Activation checkpointing runs layers again in the backward, with this batch's weights.
        self._sites.install(self.memory.leaves[copy])
        errors = None if self.is_last else self._take_errors(batch)
        # Without an error signal the stages above do not depend on this one: nothing to do, as in
        # a plain backward.
        if self.is_last or errors is not None:
            with said_where(f"the backward of {self._named(batch)}"):
                if self.replays:
                    assert leaf is not None
                    roots = self._forward_again(leaf, copy, batch, random_state)
                self._run_backward(roots, errors, batch, keep=lent)
        self.memory.collect_gradients(copy, row)
        leaves = distinct(leaf)
        gradients = self._updates.gradients
        if gradients is not None:
            gradients.add(batch, roots if self.is_last else errors or ())
            for tensor in leaves:
                if tensor.grad is not None:
                    tensor.grad = gradients.passed_down(tensor.grad)
        if not self.is_first:
            self._pass_down(batch, leaves)

    def _run_backward(
        self, roots: Sequence[Tensor], errors: Errors | None, batch: int, *, keep: bool
    ) -> None:
        if self.is_last:
            (loss,) = roots
            torch.autograd.backward([loss], [self._start(loss, batch)], retain_graph=keep)
            return
        assert errors is not None
        outputs, signals = reached(roots, errors)
        if outputs:
            torch.autograd.backward(outputs, signals, retain_graph=keep)

    def _start(self, loss: Tensor, batch: int) -> Tensor | None:
        """What the backward of ``loss`` starts from; None: from 1."""
        gradients = self._updates.gradients
        scales = None if gradients is None else gradients.hyper.scales
        return None if scales is None else torch.full_like(loss, scales.of(batch))

    def _update(self, source: int, copy: int, row: int, batch: int) -> None:
        """The update of ``batch`` where Python has a part in it; see :meth:`StageUpdates.run`."""
        with said_where(f"the update of {self._named(batch)}"):
            self._updates.run(source, copy, row, batch, self._update_natively)

    def _copy_weights(self, source: int, copy: int, batch: int) -> None:
        """As the native copy does, where there is no native update."""
        self.memory.copy_weights(source, copy)

    def _named(self, batch: int) -> str:
        """``batch`` of the segment, for people."""
        return f"batch {self._first_batch + batch} at stage {self.index}"

    def _check_leaves_once(self, roots: Sequence[Tensor], leaf: Nested, copy: int) -> None:
        if not self._leaves_checked:
            self._check_leaves(roots, leaf, copy)
            self._leaves_checked = True

    def _check_leaves(self, roots: Sequence[Tensor], leaf: Nested, copy: int) -> None:
        """Refuse what would get a gradient and never be trained."""
        known = {*map(id, distinct(leaf)), *map(id, self.memory.leaves[copy])}
        for unknown in (x for x in graph_leaves(roots) if id(x) not in known):
            raise AliasedParameterError(
                f"stage {self.index} computes with a tensor of shape {tuple(unknown.shape)} that wants "
                f"a gradient but is no registered parameter of this stage's layers (it was kept in a "
                f"plain Python list or attribute, or belongs to another stage or to the loss), so it "
                f"would never be trained. Reach it through the module that registers it, in the same "
                f"stage; keep lists of parameters in nn.ParameterList; or set requires_grad_(False)."
            )


def _wants_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad
