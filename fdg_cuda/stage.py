"""One stage: its layers, the slots that hold its batches in flight, its forward and backward.

What differs between kinds of devices (how mail travels, on which stream things run) is in the
subclasses: :mod:`fdg_cuda.cpu_stage` and :mod:`fdg_cuda.cuda_stage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda._core import Work
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.chain import check_output
from fdg_cuda.errors import AliasedParameterError, said_where
from fdg_cuda.flat import FlatMemory
from fdg_cuda.gradients import Gradients, UpdateRule
from fdg_cuda.hyper import HyperTable
from fdg_cuda.kept_state import KeptState
from fdg_cuda.layout import Step
from fdg_cuda.optim import DelayedOptimizer, DelayedTorch
from fdg_cuda.stage_optimizer import FusedSgd, StageOptimizer, State, TorchOptimizer

# Gives (output, batch) of the last stage to whoever computes the loss; returns the scalar loss.
LossOfBatch = Callable[[Tensor, int], Tensor]


@dataclass
class Slot:
    """One batch between its forward and its backward."""

    input: Tensor | None = None  # the leaf whose gradient is the error signal for the stage below
    root: Tensor | None = None  # the stage's output; at the last stage the loss


@dataclass(frozen=True)
class Snapshot:
    """A stage's whole training state at a drained point."""

    weights: Tensor
    optimizer: list[dict[str, Any]]  # per parameter
    buffers: SavedBuffers


class _ParameterSites:
    """Where the layers keep their trainable parameters, so that a slot's own can be put there."""

    def __init__(self, layers: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._sites: list[tuple[nn.Module, str, int, bool]] = []
        for module in {id(m): m for layer in layers for m in layer.modules()}.values():
            # Recurrent layers keep a second list of their weights up to date in __setattr__.
            observed = type(module).__setattr__ is not nn.Module.__setattr__
            for name, parameter in module._parameters.items():
                if id(parameter) in numbers:
                    self._sites.append((module, name, numbers[id(parameter)], observed))
        self._installed: Sequence[nn.Parameter] | None = None

    def install(self, parameters: Sequence[nn.Parameter]) -> None:
        if parameters is self._installed:
            return
        for module, name, number, observed in self._sites:
            if observed:
                setattr(module, name, parameters[number])
            else:
                module._parameters[name] = parameters[number]
        self._installed = parameters


def graph_leaves(root: Tensor) -> Iterator[Tensor]:
    """The leaf tensors into which a backward from ``root`` would put gradients."""
    if root.grad_fn is None and root.requires_grad:
        yield root
    todo, seen = [root.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo.extend(following for following, _ in node.next_functions)


class Stage(ABC):
    """Stage ``index`` of a runner. Its work is enqueued or run one action at a time.

    Args:
        index: the stage's number.
        layers: its part of the chain.
        slots: batches it holds at once.
        stash: whether each slot has its own weight copy.
        rule: how it comes from gradients to an update.
        device: where its parameters, activations and gradients lie.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[nn.Module],
        slots: int,
        *,
        stash: bool,
        rule: UpdateRule,
        device: torch.device,
    ) -> None:
        self.index = index
        self.layers = list(layers)
        self.device = device
        self._slots = [Slot() for _ in range(slots)]
        self._stash = stash
        self._rule = rule
        self._gradients: Gradients | None = None  # of the running fit, if Python has a part in it
        self._copies = slots if stash else 1
        self.memory = self._lay_out()
        self._sites = _ParameterSites(self.layers, self.memory.parameters)
        self._kept = KeptState()
        self._optimizer: StageOptimizer | None = None  # over the memory, once there was an update
        self._input_changed_in_place: bool | None = None
        self._leaves_checked = False
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
        self._sites = _ParameterSites(self.layers, self.memory.parameters)
        self._input_changed_in_place = None

    def begin_updates(self, hyper: HyperTable) -> dict[str, Any]:
        """Make what updates need that Python has a part in.

        Returns:
            What a native update has to know beyond the memory; see :meth:`FlatMemory.addresses`.
        """
        if self._optimizer is None:
            self._optimizer = self._make_optimizer(hyper.optimizer)
            self._optimizer.load(self._kept.of(self.memory.parameters))
        if isinstance(self._optimizer, TorchOptimizer):
            groups = self._optimizer.groups
        else:
            groups = hyper.optimizer.groups_of(self.memory.parameters)
        if self._rule.needs_python:
            self._gradients = Gradients(self.memory, self._rule, hyper, groups)
        gain = None if self._gradients is None else self._gradients.gain
        return {"groups": groups, "gain": gain}

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
        self._gradients = None

    def begin_epoch(self, first_slot: int) -> None:
        """Take the caller's weights into the slot that is forwarded first.

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

    def end_epoch(self) -> None:
        """Give the newest weights to the caller's parameters and let go of all batches."""
        self._sites.install(self.memory.parameters)
        self.memory.publish()
        self.memory.release_gradients()
        for slot in self._slots:
            slot.input = slot.root = None

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
    def _take_input(self, batch: int) -> Tensor:
        """What the stage below sent, or what entered: a leaf that wants a gradient if it can."""

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
        held.root, output = self._compute(leaf, batch)
        if not self.is_last:
            self._pass_up(slot, batch, output)
        if not self._leaves_checked:
            self._check_leaves(held.root, leaf, copy)
            self._leaves_checked = True

    def _compute(self, leaf: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """What a backward starts from (at the last stage the loss), and the stage's output."""
        with said_where(f"the forward of batch {batch} at stage {self.index}"):
            output = self._run_layers(leaf, batch)
        if not self.is_last:
            return output, output.detach()
        assert self.loss is not None
        with said_where(f"the loss of batch {batch}"):
            return self.loss(output, batch), output.detach()

    def _run_layers(self, leaf: Tensor, batch: int) -> Tensor:
        """The layers on ``leaf``, which belongs to the stage below (or to the caller's loader).

        A stage that begins with an in-place layer must work on a copy. The first batch finds out.
        """
        value = leaf if self._input_changed_in_place is False else leaf.clone()
        version = value._version
        probe = value
        for layer in self.layers:
            value = layer(value)
        if self._input_changed_in_place is None:
            self._input_changed_in_place = probe._version != version
        elif not self._input_changed_in_place and probe._version != version:
            raise RuntimeError(
                f"stage {self.index} changed its input in place at batch {batch} but not at the "
                f"first batch; make its first layer work out of place (inplace=False)"
            )
        return check_output(value, f"stage {self.index}")

    def _backward(self, slot: int, copy: int, batch: int, row: int = 0) -> None:
        held = self._slots[slot]
        leaf, root = held.input, held.root
        held.input = held.root = None
        # Activation checkpointing runs layers again in the backward, with this batch's weights.
        self._sites.install(self.memory.leaves[copy])
        error = None if self.is_last else self._take_error(batch)
        # Without an error signal the stages above do not depend on this one: nothing to do, as in
        # a plain backward.
        if self.is_last or error is not None:
            assert root is not None
            if root.requires_grad:
                with said_where(f"the backward of batch {batch} at stage {self.index}"):
                    torch.autograd.backward([root], [error])
        self.memory.collect_gradients(copy, row)
        if self._gradients is not None:
            self._gradients.add()
        if not self.is_first:
            self._pass_down(batch, leaf)

    def _update(self, source: int, copy: int, row: int, batch: int) -> None:
        """The update of ``batch`` where Python has a part in it: from weight copy ``source`` into
        ``copy``, with the gradients of ``row``."""
        assert self._gradients is not None
        with said_where(f"the update of batch {batch} at stage {self.index}"):
            ready = self._gradients.prepare(batch)
            if isinstance(self._optimizer, TorchOptimizer):
                self._optimizer.update(source, copy, ready, self._gradients.hyper.values(batch))
            else:
                self._gradients.place(ready, row)
                self._update_natively(source, copy, row, batch)

    def _copy_weights(self, source: int, copy: int, batch: int) -> None:
        """As the native copy does, where there is no native update."""
        self.memory.copy_weights(source, copy)

    def _check_leaves(self, root: Tensor, leaf: Tensor, copy: int) -> None:
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
