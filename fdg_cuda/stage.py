"""One stage: its layers, the slots that hold its batches in flight, its forward and backward.

What differs between kinds of devices (how mail travels, on which stream things run) is in the
subclasses: :mod:`fdg_cuda.cpu_stage` and :mod:`fdg_cuda.cuda_stage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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
from fdg_cuda.gradients import Gradients, UpdateRule
from fdg_cuda.hyper import HyperTable
from fdg_cuda.kept_state import KeptState
from fdg_cuda.layout import Step
from fdg_cuda.nested import Nested, map_tensors, repacked, tensors
from fdg_cuda.optim import DelayedOptimizer, DelayedTorch
from fdg_cuda.parameter_sites import ParameterSites, graph_leaves
from fdg_cuda.precision import Precision
from fdg_cuda.randomness import RandomState
from fdg_cuda.stage_optimizer import FusedSgd, StageOptimizer, State, TorchOptimizer
from fdg_cuda.update_measures import UpdateMeasures, UpdateMeter

# Gives (output, batch) of the last stage to whoever computes the loss; returns the scalar loss.
LossOfBatch = Callable[[Tensor, int], Tensor]


@dataclass
class Slot:
    """One batch between its forward and its backward."""

    # The leaf whose gradient is the error signal for the stage below; at stage 0 what entered.
    input: Nested = None
    root: Tensor | None = None  # the stage's output; at the last stage the loss
    random_state: RandomState = ()  # with which the forward began, if it will be run again


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
        self._rule = rule
        self.precision = precision
        self._gradients: Gradients | None = None  # of the running fit, if Python has a part in it
        self._meter: UpdateMeter | None = None  # of the running fit, if updates are measured
        self._copies = slots if self._stash else 1
        self.replays = mode.replays(slots)
        self.memory = self._lay_out()
        self._sites = ParameterSites(self.layers, self.memory.parameters)
        self._kept = KeptState()
        self._optimizer: StageOptimizer | None = None  # over the memory, once there was an update
        self._input_changed_in_place: bool | None = None
        self._leaves_checked = False
        self._first_batch = 0
        self.loss: LossOfBatch | None = None  # of the last stage, set by the pipeline

    # -- on the caller's thread, with nothing running ------------------------------------------

    def lay_out_anew(self) -> None:
        """For a new ``fit``: lay the parameters out anew if they changed."""
        trainable = self._trainable()
        if not self.memory.matches(trainable):
            if self._optimizer is not None:  # parameters that are frozen now may come back
                self._kept.keep(self._optimizer)
            self._optimizer = None
            self.memory = self._lay_out()
        # Anew each time: a layer may keep a parameter elsewhere than before (parametrizations).
        self._sites = ParameterSites(self.layers, self.memory.parameters)
        self._input_changed_in_place = None

    def begin_updates(self, hyper: HyperTable) -> dict[str, Any]:
        """Make what updates need that Python has a part in.

        Returns:
            What a native update has to know beyond the memory; see :meth:`FlatMemory.addresses`.
        """
        if self._optimizer is None:
            self._optimizer = self._make_optimizer(hyper.optimizer)
            kept = self._kept.of(self.memory.parameters)
            if any(kept):
                self._optimizer.load(kept)
        if isinstance(self._optimizer, TorchOptimizer):
            groups = self._optimizer.groups
        else:
            groups = hyper.optimizer.groups_of(self.memory.parameters)
        if self._rule.needs_python:
            self._gradients = Gradients(self.memory, self._rule, hyper, groups)
        gain = None if self._gradients is None else self._gradients.gain
        return {"groups": groups, "gain": gain}

    def measure_updates(self, measures: UpdateMeasures) -> None:
        """Measure updates of this ``fit``, of which none was enqueued yet."""
        if self.memory.parameters:
            self._meter = UpdateMeter(self.memory, self.index, measures)

    @property
    def _updates_in_python(self) -> bool:
        return self._gradients is not None or self._meter is not None

    def optimizer_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the optimizer remembers of each parameter it has updated, frozen ones included: copies
        of tensors, and plain values. Of the fused SGD that is ``momentum_buffer``, of the parameter's
        shape; of others what their ``state`` holds."""
        if self._optimizer is not None:
            self._kept.keep(self._optimizer)
        return self._kept.copies(self._parameters())

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
        self._kept.replace(state)
        if self._optimizer is not None:
            self._optimizer.load(self._kept.of(self.memory.parameters))

    def _make_optimizer(self, face: DelayedOptimizer) -> StageOptimizer:
        if not isinstance(face, DelayedTorch) or not self.memory.parameters:
            return FusedSgd(self.memory)
        tensors = [nn.Parameter(leaf.data) for leaf in self.memory.leaves[0]]
        made = face.make_for(self.memory.parameters, tensors, self.index)
        return TorchOptimizer(self.memory, tensors, made)

    def end_fit(self) -> None:
        """Let go of what only a running ``fit`` needs."""
        self.loss = None
        self._gradients = self._meter = None

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
        if self._gradients is not None:
            self._gradients.forget()
        self._leaves_checked = False
        self._first_batch = first_batch

    def end_epoch(self) -> None:
        """Give the newest weights to the caller's parameters and let go of all batches."""
        self._sites.install(self.memory.parameters)
        self.memory.publish()
        self.memory.release_gradients()
        for slot in self._slots:
            slot.input = slot.root = None
            slot.random_state = ()

    def snapshot(self) -> Snapshot:
        """Copies of the newest weights, the optimizer's state and the modules' buffers."""
        return Snapshot(
            self.memory.newest_weights.clone(),
            [] if self._optimizer is None else self._optimizer.snapshot(),
            SavedBuffers(self.layers),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``."""
        self.memory.newest_weights.copy_(snapshot.weights)
        if self._optimizer is not None:
            self._optimizer.load(snapshot.optimizer)
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

    @property
    @abstractmethod
    def is_last(self) -> bool:
        """Whether no stage is above this one."""

    @abstractmethod
    def _take_input(self, batch: int) -> Nested:
        """What the stage below sent, a leaf that wants a gradient if it can; or what entered."""

    @abstractmethod
    def _take_error(self, batch: int) -> Tensor | None:
        """The error signal the stage above sent; None if it depends on nothing here."""

    @abstractmethod
    def _pass_up(self, slot: int, batch: int, output: Tensor) -> None:
        """Make ``output`` ready to be sent."""

    @abstractmethod
    def _update_natively(self, source: int, copy: int, row: int, batch: int) -> None:
        """The fused update, now; see :meth:`_update`."""

    @abstractmethod
    def _pass_down(self, batch: int, leaf: Tensor | None) -> None:
        """Make the gradient of the stage's input ``leaf`` ready to be sent; None: there is none."""

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
            held.root, output = self._compute(leaf, batch)
        if not self.is_last:
            self._pass_up(slot, batch, output)
        if held.root is not None:
            self._check_leaves_once(held.root, leaf, copy)

    def _forward_again(
        self, leaf: Nested, copy: int, batch: int, random_state: RandomState
    ) -> Tensor:
        """The graph of a batch that was forwarded without one: with the weights of the moment, but
        the random numbers of its forward. Buffers stay as they are: they moved back then.
        """
        buffers, present = SavedBuffers(self.layers), self.random_state()
        self.set_random_state(random_state)
        try:
            root, _ = self._compute(leaf, batch)
        finally:
            self.set_random_state(present)
            buffers.restore()
        self._check_leaves_once(root, leaf, copy)
        return root

    def _compute(self, leaf: Nested, batch: int) -> tuple[Tensor, Tensor]:
        """What a backward starts from (at the last stage the loss), and the stage's output."""
        autocast = self.precision.autocast(self.device.type)
        with said_where(f"the forward of {self._named(batch)}"), autocast:
            output = self._run_layers(leaf, batch)
        if not self.is_last:
            return output, output.detach()
        assert self.loss is not None
        autocast = self.precision.autocast(self.device.type)
        with said_where(f"the loss of batch {self._first_batch + batch}"), autocast:
            return self.loss(output, batch), output.detach()

    def _run_layers(self, leaf: Nested, batch: int) -> Tensor:
        """The layers on ``leaf``, which belongs to the stage below (or to the caller's loader).

        A stage that begins with an in-place layer must work on a copy. The first batch finds out.
        """
        unchanged = self._input_changed_in_place is False
        value = repacked(leaf) if unchanged else map_tensors(torch.clone, leaf)
        probes = [(tensor, tensor._version) for tensor in tensors(value)]
        for layer in self.layers:
            value = layer(value)
        changed = any(probe._version != version for probe, version in probes)
        if self._input_changed_in_place is None:
            self._input_changed_in_place = changed
        elif not self._input_changed_in_place and changed:
            raise RuntimeError(
                f"stage {self.index} changed its input in place at batch {self._first_batch + batch} "
                f"but not at the first batch; make its first layer work out of place (inplace=False)"
            )
        return check_output(value, f"stage {self.index}")

    def _backward(self, slot: int, copy: int, batch: int, row: int = 0) -> None:
        held = self._slots[slot]
        leaf, root, random_state = held.input, held.root, held.random_state
        held.input = held.root = None
        held.random_state = ()
        # Activation checkpointing runs layers again in the backward, with this batch's weights.
        self._sites.install(self.memory.leaves[copy])
        error = None if self.is_last else self._take_error(batch)
        # Without an error signal the stages above do not depend on this one: nothing to do, as in
        # a plain backward.
        if self.is_last or error is not None:
            with said_where(f"the backward of {self._named(batch)}"):
                if self.replays:
                    assert leaf is not None
                    root = self._forward_again(leaf, copy, batch, random_state)
                assert root is not None
                if root.requires_grad:
                    start = self._start(root, batch) if self.is_last else error
                    torch.autograd.backward([root], [start])
        self.memory.collect_gradients(copy, row)
        if self._gradients is not None:
            self._gradients.add(batch, root if self.is_last else error)
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                leaf.grad = self._gradients.passed_down(leaf.grad)
        if not self.is_first:
            self._pass_down(batch, leaf)

    def _start(self, loss: Tensor, batch: int) -> Tensor | None:
        """What the backward of ``loss`` starts from; None: from 1."""
        scales = None if self._gradients is None else self._gradients.hyper.scales
        return None if scales is None else torch.full_like(loss, scales.of(batch))

    def _update(self, source: int, copy: int, row: int, batch: int) -> None:
        """The update of ``batch`` where Python has a part in it: from weight copy ``source`` into
        ``copy``, with the gradients of ``row``."""
        measuring = (
            nullcontext() if self._meter is None else self._meter.around(source, copy, batch)
        )
        with said_where(f"the update of {self._named(batch)}"), measuring:
            if self._gradients is None:
                self._update_natively(source, copy, row, batch)
                return
            ready = self._gradients.prepare(batch)
            if isinstance(self._optimizer, TorchOptimizer) and ready.skipped:
                self.memory.copy_weights(source, copy)
                self.memory.count_update()
            elif isinstance(self._optimizer, TorchOptimizer):
                self._optimizer.update(source, copy, ready, self._gradients.hyper.values(batch))
            else:
                self._gradients.place(ready, row)
                self._update_natively(source, copy, row, batch)

    def _copy_weights(self, source: int, copy: int, batch: int) -> None:
        """As the native copy does, where there is no native update."""
        self.memory.copy_weights(source, copy)

    def _named(self, batch: int) -> str:
        """``batch`` of the segment, for people."""
        return f"batch {self._first_batch + batch} at stage {self.index}"

    def _check_leaves_once(self, root: Tensor, leaf: Nested, copy: int) -> None:
        if not self._leaves_checked:
            self._check_leaves(root, leaf, copy)
            self._leaves_checked = True

    def _check_leaves(self, root: Tensor, leaf: Nested, copy: int) -> None:
        """Refuse what would get a gradient and never be trained."""
        known = {id(leaf), *map(id, self.memory.leaves[copy])}
        for unknown in (x for x in graph_leaves(root) if id(x) not in known):
            raise AliasedParameterError(
                f"stage {self.index} computes with a tensor of shape {tuple(unknown.shape)} that wants "
                f"a gradient but is no registered parameter of this stage's layers (it was kept in a "
                f"plain Python list or attribute, or belongs to another stage or to the loss), so it "
                f"would never be trained. Reach it through the module that registers it, in the same "
                f"stage; keep lists of parameters in nn.ParameterList; or set requires_grad_(False)."
            )


def wants_gradient(tensor: Tensor) -> bool:
    """Whether an error signal can be computed for ``tensor``."""
    return tensor.is_floating_point() or tensor.is_complex()
