"""A chain run layer by layer, each with an autograd graph of its own: what each layer takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batch
from fdg_cuda.chain import check_loss, check_output
from fdg_cuda.errors import said_where
from fdg_cuda.nested import Nested, cloned, distinct, leaf_of, map_distinct, tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision
from fdg_cuda.saved_bytes import SavedBytes
from fdg_cuda.whole_pass import WholePass, run_whole


@dataclass
class Passed:
    """One layer in one pass."""

    forward: float = 0.0
    backward: float = 0.0
    input_bytes: int = 0
    output_bytes: int = 0
    packed_bytes: int = 0
    error_bytes: int = 0


@dataclass
class Pass:
    """``layers`` one by one, and all of them as one piece. None: not run."""

    layers: list[Passed]
    whole: WholePass | None = None


class _Taken(torch.autograd.Function):
    """Copies of what a layer takes, since it may work in place on it. Gradients go into ``errors``.

    Autograd would copy the gradient of a tensor that layers hand through, such as the skip of a residual
    block, once for each of them, which no stage does.
    """

    @staticmethod
    def forward(ctx: Any, errors: list[Tensor | None], *taken: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.errors = errors
        copies = tuple(tensor.clone() for tensor in taken)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(copy for copy, need in zip(copies, needed, strict=True) if not need)
        )
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.errors[:] = gradients
        return (None, *(None for _ in gradients))


def _next(copies: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(copies)


class LayerByLayer:
    """``layers`` one by one, each with an autograd graph of its own, and all in one."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        batch: Batch,
        loss: LossFunction,
        precision: Precision,
        synchronize: Callable[[], object],
    ) -> None:
        self._layers = list(layers)
        self._batch = batch
        self._loss = loss
        self._precision = precision
        self._synchronize = synchronize

    def run_and_whole(self) -> Pass:
        """A pass of both kinds."""
        layers = self.run().layers
        return Pass(
            layers,
            run_whole(self._layers, self._batch, self._loss, self._precision, self._synchronize),
        )

    def run(self, counted: SavedBytes | None = None) -> Pass:
        """A forward and a backward of every layer. ``counted``: takes note of what autograd keeps."""
        passed = [Passed() for _ in self._layers]
        x = map_distinct(torch.detach, self._batch[0])
        target = cloned(self._batch[1])  # a loss may change it
        errors_of: list[list[Tensor | None]] = []  # each layer's, of what it took
        given: list[list[Tensor]] = []
        for number, each in enumerate(passed):
            inputs = distinct(x)
            errors_of.append([None] * len(inputs))
            copies = iter(_Taken.apply(errors_of[-1], *map(leaf_of, inputs)))  # type: ignore[no-untyped-call]
            value = map_distinct(partial(_next, copies), x)  # in the same order
            x = self._forward(number, value, target, each, counted)
            given.append(distinct(x))
            each.input_bytes = sum(tensor.nbytes for tensor in inputs)
            each.output_bytes = sum(tensor.nbytes for tensor in given[-1])
            each.packed_bytes = each.output_bytes if len(given[-1]) > 1 else 0
        del x, value, inputs, copies
        # All is let go of behind its backward, as in stages: memory that was in use just now is the
        # fastest to use again.
        errors: list[Tensor | None] = [None]  # autograd's 1, for the loss
        for number in reversed(range(len(passed))):
            last = number == len(passed) - 1
            roots = [
                (output, error)
                for output, error in zip(given.pop(), errors, strict=True)
                if output.requires_grad and (error is not None or last)
            ]
            if roots:
                begin = self._now()
                torch.autograd.backward([root for root, _ in roots], [error for _, error in roots])
                passed[number].backward = self._now() - begin
            errors = errors_of.pop()
            if number > 0:
                passed[number].error_bytes = sum(e.nbytes for e in errors if e is not None)
            for parameter in self._layers[number].parameters():
                parameter.grad = None
        return Pass(passed)

    def _forward(
        self,
        number: int,
        value: Nested,
        target: Nested,
        passed: Passed,
        counted: SavedBytes | None,
    ) -> Nested:
        layer = self._layers[number]
        last = number == len(self._layers) - 1
        with nullcontext() if counted is None else counted.begin(layer, value):
            begin = self._now()
            with (
                said_where(f"layer {number}, a {type(layer).__name__}, at the first batch"),
                self._autocast(),
            ):
                given = output = layer(value)
            check_output(output, f"layer {number}")
            if last:
                with said_where("the loss of the first batch"), self._autocast():
                    given = check_loss(self._loss(output, target), 0)
            passed.forward = self._now() - begin
        if counted is not None:
            counted.end(output)
        return given

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _autocast(self) -> AbstractContextManager[object]:
        return self._precision.autocast(tensors(self._batch[0])[0].device.type)
