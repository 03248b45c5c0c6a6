"""One stage: its layers, the slots that hold its batches in flight, its forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fdg_cuda._core import FlatSgd, Work
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.chain import check_output
from fdg_cuda.errors import AliasedParameterError, said_where
from fdg_cuda.flat import FlatMemory
from fdg_cuda.layout import INBOX_HALVES, Step
from fdg_cuda.schedule import Kind

# Gives (output, batch) of the last stage to whoever computes the loss; returns the scalar loss.
LossOfBatch = Callable[[Tensor, int], Tensor]


@dataclass
class _Slot:
    """One batch between its forward and its backward."""

    input: Tensor | None = None  # the leaf whose gradient is the error signal for the stage below
    root: Tensor | None = None  # the stage's output; at the last stage the loss


@dataclass(frozen=True)
class Snapshot:
    """A stage's whole training state at a drained point."""

    weights: Tensor
    momentum: Tensor
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


class Stage:
    """Stage ``index`` of a runner. Its work runs on its own stream, one action at a time.

    Args:
        index: the stage's number.
        layers: its part of the chain.
        slots: batches it holds at once.
        stash: whether each slot has its own weight copy.
    """

    def __init__(self, index: int, layers: Sequence[nn.Module], slots: int, *, stash: bool) -> None:
        self.index = index
        self.layers = list(layers)
        self._slots = [_Slot() for _ in range(slots)]
        self._stash = stash
        self._copies = slots if stash else 1
        self.memory = FlatMemory(self._trainable(), self._copies, index)
        self._sites = _ParameterSites(self.layers, self.memory.parameters)
        self._momentum = WeakTensorKeyDictionary()
        self._sgd: FlatSgd | None = None
        self._input_changed_in_place: bool | None = None
        self._leaves_checked = False
        # Wiring, set by the runner.
        self.below: Stage | None = None
        self.above: Stage | None = None
        self.loss: LossOfBatch | None = None
        self.inputs: dict[int, Tensor] = {}  # stage 0: batches that entered, by number
        # Mail: what the neighbours sent, and what this stage is about to send.
        self._activations: list[Tensor | None] = [None] * INBOX_HALVES
        self._errors: list[Tensor | None] = [None] * INBOX_HALVES
        self._output: Tensor | None = None
        self._error: Tensor | None = None

    # -- on the caller's thread, with nothing running ------------------------------------------

    def begin_fit(self, *, hyper: np.ndarray, threads: int) -> None:
        """Lay the parameters out anew if they changed, and make the native update."""
        trainable = self._trainable()
        if not self.memory.matches(trainable):
            # Parameters that are frozen now may come back.
            self.memory.remember_momentum(self._momentum)
            self.memory = FlatMemory(trainable, self._copies, self.index)
            self.memory.recall_momentum(self._momentum)
        # Anew each time: a layer may keep a parameter elsewhere than before (parametrizations).
        self._sites = _ParameterSites(self.layers, self.memory.parameters)
        self._sgd = self.memory.native_sgd(hyper, threads)
        self._input_changed_in_place = None

    def end_fit(self) -> None:
        self._sgd = None
        self.loss = None

    def begin_epoch(self, first_slot: int) -> None:
        """Take the caller's weights into the slot that is forwarded first.

        Raises:
            RuntimeError: parameters were frozen, thawed or replaced since ``begin_fit``.
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
        self._leaves_checked = False

    def end_epoch(self) -> None:
        """Give the newest weights to the caller's parameters and let go of all batches."""
        self._sites.install(self.memory.parameters)
        self.memory.publish()
        self.memory.release_gradients()
        for slot in self._slots:
            slot.input = slot.root = None
        self.inputs.clear()
        self._activations = [None] * INBOX_HALVES
        self._errors = [None] * INBOX_HALVES
        self._output = self._error = None

    def snapshot(self) -> Snapshot:
        """Copies of the newest weights, the momentum and the modules' buffers."""
        return Snapshot(
            self.memory.newest_weights.clone(),
            self.memory.momentum.clone(),
            SavedBuffers(self.layers),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``."""
        self.memory.newest_weights.copy_(snapshot.weights)
        self.memory.momentum.copy_(snapshot.momentum)
        snapshot.buffers.restore()

    def _trainable(self) -> list[nn.Parameter]:
        unique = {id(p): p for layer in self.layers for p in layer.parameters() if p.requires_grad}
        return list(unique.values())

    # -- on the stage's stream ----------------------------------------------------------------

    def work(self, step: Step) -> Callable[[int], None] | Work | None:
        slot = step.slot
        copy = slot if self._stash else 0
        match step.kind:
            case Kind.FORWARD:
                return partial(self._forward, slot, copy)
            case Kind.BACKWARD:
                return partial(self._backward, slot, copy)
            case Kind.SEND_ACTIVATION:
                return self._send_activation
            case Kind.SEND_ERROR:
                return self._send_error
            case Kind.COPY_WEIGHTS:
                if not self._stash or not self.memory.parameters:
                    return None
                return self._native().copy(step.source, slot)
            case Kind.UPDATE:
                if not self.memory.parameters:
                    return None
                return self._native().update(step.source if self._stash else 0, copy)
            case _:
                raise ValueError(f"a stage on the CPU has no part in a {step.kind}")

    def _native(self) -> FlatSgd:
        assert self._sgd is not None, "begin_fit comes first"
        return self._sgd

    def _forward(self, slot: int, copy: int, batch: int) -> None:
        self._sites.install(self.memory.leaves[copy])
        leaf = self._take_input(batch)
        with said_where(f"the forward of batch {batch} at stage {self.index}"):
            output = self._run_layers(leaf, batch)
        held = self._slots[slot]
        held.input = leaf
        if self.above is None:
            assert self.loss is not None
            with said_where(f"the loss of batch {batch}"):
                held.root = self.loss(output, batch)
        else:
            held.root = output
            self._output = output.detach()
        if not self._leaves_checked:
            self._check_leaves(held.root, leaf, copy)
            self._leaves_checked = True

    def _take_input(self, batch: int) -> Tensor:
        if self.below is None:
            return self.inputs.pop(batch)
        half = batch % INBOX_HALVES
        activation = self._activations[half]
        assert activation is not None, f"no activation of batch {batch} at stage {self.index}"
        self._activations[half] = None
        return activation.requires_grad_(activation.is_floating_point() or activation.is_complex())

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

    def _backward(self, slot: int, copy: int, batch: int) -> None:
        held = self._slots[slot]
        leaf, root = held.input, held.root
        held.input = held.root = None
        # Activation checkpointing runs layers again in the backward, with this batch's weights.
        self._sites.install(self.memory.leaves[copy])
        assert leaf is not None
        assert root is not None
        error = None
        if self.above is not None:
            half = batch % INBOX_HALVES
            error = self._errors[half]
            self._errors[half] = None
        # Without an error signal the stages above do not depend on this one: nothing to do, as in
        # a plain backward.
        if root.requires_grad and (self.above is None or error is not None):
            with said_where(f"the backward of batch {batch} at stage {self.index}"):
                torch.autograd.backward([root], [error])
        self.memory.collect_gradients(copy)
        if self.below is not None:
            self._error = leaf.grad
            leaf.grad = None

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

    def _send_activation(self, batch: int) -> None:
        assert self.above is not None
        self.above._activations[batch % INBOX_HALVES] = self._output
        self._output = None

    def _send_error(self, batch: int) -> None:
        assert self.below is not None
        self.below._errors[batch % INBOX_HALVES] = self._error
        self._error = None
