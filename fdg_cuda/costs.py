"""What each layer of a chain costs: seconds, and bytes kept and handed on, for one batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batch
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.chain import check_loss, check_output
from fdg_cuda.errors import said_where
from fdg_cuda.flat import padded_bytes
from fdg_cuda.nested import Nested, cloned, distinct, leaf_of, map_distinct, tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision
from fdg_cuda.saved_bytes import SavedBytes
from fdg_cuda.whole_pass import WholePass, run_whole

# Passes behind the one that warms up.
MOST_PASSES, LEAST_PASSES = 9, 3
# No more passes than the least behind so many seconds, and none that would end beyond the limit, not
# even one behind the first: what warms up is little of a pass that long.
ENOUGH_SECONDS, LIMIT_SECONDS = 6.0, 12.0
EMPTY_LAYERS = 20


@dataclass(frozen=True)
class LayerCost:
    """One layer's part in a step of one batch. What belongs to the loss counts to the last layer.

    Attributes:
        forward, backward: seconds.
        parameter_bytes: trainable ones, as :class:`~fdg_cuda.flat.FlatMemory` lays them out; those that
            several layers share, no cut between them, are the first one's.
        fixed_bytes: buffers and frozen parameters, likewise.
        saved_bytes: what autograd keeps from forward to backward, beside parameters, buffers and the
            layer's input.
        input_bytes: what it takes.
        output_bytes: what it gives, and sends to the stage above if it is its stage's last layer.
        packed_bytes: what its output is copied to in order to be sent, if it is several tensors; one is
            sent as it is.
        error_bytes: the gradients of what it takes, which it sends to the stage below if it is its
            stage's first layer.
        kept_input_bytes: what autograd keeps of its input that the layers before do not keep anyway.
            In a stage's first layer it is part of what the stage took.
        kept_output_bytes: what autograd keeps of its output.
    """

    forward: float
    backward: float
    parameter_bytes: int = 0
    fixed_bytes: int = 0
    saved_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    kept_input_bytes: int = 0
    kept_output_bytes: int = 0
    packed_bytes: int = 0


def measure(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: LossFunction,
    *,
    threads: int,
    precision: Precision = Precision.FLOAT32,
    synchronize: Callable[[], object] = lambda: None,
    random_devices: Sequence[int] = (),
    patience: float = 1.0,
    stopped: Callable[[], bool] = lambda: False,
) -> list[LayerCost]:
    """What each layer costs on ``batch``.

    Seconds are medians over repeated passes through the whole chain, behind one that warms up and
    counts the bytes. Where other programs share the processor, layers' smallest times, which do not fall
    into the same pass, add up to less than any pass took; medians add up to the median pass.

    Measured one by one, each layer has an autograd graph of its own and clock readings around it, on
    CUDA devices waits too: some 0.1 ms that stages do not have, and more than a small layer takes. It is
    known from layers that do nothing. And what a layer takes and gives is less likely to be in a cache.
    So every repeated pass also runs the chain as one piece, and layers' times are made to add up to its.

    Leaves no trace: buffers, gradients, the global random state and the thread count are as before.

    Args:
        threads: intra-op threads to measure with.
        precision: in which layers and loss compute.
        synchronize: waits until the device has done what it was given.
        random_devices: CUDA devices whose random state is to be as before.
        patience: times as many passes, and seconds for them, as usual.
        stopped: whether to make no more passes, since nobody wants the result.
    """
    buffers = SavedBuffers(layers)
    gradients = [(p, p.grad) for layer in layers for p in layer.parameters()]
    previous_threads = torch.get_num_threads()
    chain = _Chain(layers, batch, loss, precision, synchronize)
    try:
        torch.set_num_threads(threads)
        with torch.random.fork_rng(devices=list(random_devices)), torch.enable_grad():
            device = tensors(batch[0])[0].device
            overhead = _overhead(device, precision, synchronize)
            counted = SavedBytes()
            passes = _repeated(partial(chain.run, counted), chain.run_and_whole, patience, stopped)
    finally:
        torch.set_num_threads(previous_threads)
        buffers.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
    forwards = _seconds(passes, "forward", overhead)
    backwards = _seconds(passes, "backward", overhead)
    layers_passed = passes[0].layers
    parameters = _where_first([list(layer.parameters()) for layer in layers])
    buffers_of = _where_first([list(layer.buffers()) for layer in layers])
    return [
        LayerCost(
            forward=forwards[number],
            backward=backwards[number],
            parameter_bytes=sum(padded_bytes(p) for p in parameters[number] if p.requires_grad),
            fixed_bytes=sum(b.nbytes for b in buffers_of[number])
            + sum(p.nbytes for p in parameters[number] if not p.requires_grad),
            saved_bytes=counted.layers[number].saved,
            input_bytes=layers_passed[number].input_bytes,
            output_bytes=layers_passed[number].output_bytes,
            packed_bytes=layers_passed[number].packed_bytes,
            error_bytes=layers_passed[number].error_bytes,
            kept_input_bytes=counted.layers[number].kept_input,
            kept_output_bytes=counted.layers[number].kept_output,
        )
        for number in range(len(layers))
    ]


def _where_first(tensors_of: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Each layer's, without those of layers before: a stage has what its layers share once."""
    seen: set[int] = set()
    first = []
    for own in tensors_of:
        first.append([tensor for tensor in own if id(tensor) not in seen])
        seen.update(map(id, own))
    return first


def _overhead(
    device: torch.device, precision: Precision, synchronize: Callable[[], object]
) -> _Passed:
    """What layers that do nothing take one by one."""
    layers = [nn.Linear(1, 1), *(nn.Identity() for _ in range(2 * EMPTY_LAYERS)), nn.Linear(1, 1)]
    chain = _Chain(
        [layer.to(device) for layer in layers],
        (torch.ones(1, 1, device=device), None),
        lambda output, _: output.sum(),
        precision,
        synchronize,
    )
    empty = chain.run().layers[EMPTY_LAYERS:-1]  # behind as many that warm up
    return _Passed(
        statistics.median(layer.forward for layer in empty),
        statistics.median(layer.backward for layer in empty),
    )


def _seconds(passes: Sequence[_Pass], direction: str, overhead: _Passed) -> list[float]:
    """Of each layer's forward, or backward."""
    apart = [[getattr(layer, direction) for layer in each.layers] for each in passes]
    medians = [statistics.median(layer) for layer in zip(*apart, strict=True)]
    # Of the same pass, since what disturbs a machine for a while disturbs both.
    ratios = [
        getattr(each.whole, direction) / sum(seconds)
        for each, seconds in zip(passes, apart, strict=True)
        if each.whole is not None and sum(seconds) > 0
    ]
    if not ratios:
        return medians
    whole = sum(medians) * statistics.median(ratios)
    return as_one(medians, whole, getattr(overhead, direction))


def as_one(apart: Sequence[float], whole: float, overhead: float) -> list[float]:
    """What layers that took so many seconds one by one take in a chain that takes ``whole``.

    Each that took any time at all has the ``overhead`` less, if they take so much less together. The
    rest is in proportion.
    """
    excess = max(0.0, sum(apart) - whole) / max(1, sum(seconds > 0 for seconds in apart))
    left = [max(0.0, seconds - min(excess, overhead)) for seconds in apart]
    total = sum(left)
    return [seconds * whole / total for seconds in left] if total > 0 else left


def _repeated(
    first: Callable[[], _Pass],
    again: Callable[[], _Pass],
    patience: float = 1.0,
    stopped: Callable[[], bool] = lambda: False,
) -> list[_Pass]:
    """What passes came to: those behind the first, or the first if there is no time for more."""
    begin = time.perf_counter()
    passes = [first()]
    spent = time.perf_counter() - begin
    longest = 2 * spent  # those that follow run the chain twice
    while len(passes) <= patience * MOST_PASSES and spent + longest <= patience * LIMIT_SECONDS:
        if stopped() or (len(passes) > LEAST_PASSES and spent >= patience * ENOUGH_SECONDS):
            break
        passes.append(again())
        now = time.perf_counter() - begin
        spent, longest = now, max(longest, now - spent)
    return passes[1:] or passes


@dataclass
class _Passed:
    """One layer in one pass."""

    forward: float = 0.0
    backward: float = 0.0
    input_bytes: int = 0
    output_bytes: int = 0
    packed_bytes: int = 0
    error_bytes: int = 0


@dataclass
class _Pass:
    """``layers`` one by one, and all of them as one piece. None: not run."""

    layers: list[_Passed]
    whole: WholePass | None = None


class _Taken(torch.autograd.Function):
    """A copy of what a layer takes, since it may work in place on it. The gradient goes into ``caught``.

    Autograd would copy the gradient of a tensor that layers hand through, such as the skip of a residual
    block, once for each of them, which no stage does.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.caught.append(gradient)
        return None, None


def _take(caught: Iterator[list[Tensor]], tensor: Tensor) -> Any:
    return _Taken.apply(leaf_of(tensor), next(caught))  # type: ignore[no-untyped-call]


class _Chain:
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

    def run_and_whole(self) -> _Pass:
        """A pass of both kinds."""
        layers = self.run().layers
        return _Pass(
            layers,
            run_whole(self._layers, self._batch, self._loss, self._precision, self._synchronize),
        )

    def run(self, counted: SavedBytes | None = None) -> _Pass:
        """A forward and a backward of every layer. ``counted``: takes note of what autograd keeps."""
        passed = [_Passed() for _ in self._layers]
        x = map_distinct(torch.detach, self._batch[0])
        target = cloned(self._batch[1])  # a loss may change it
        caught: list[list[list[Tensor]]] = []
        given: list[list[Tensor]] = []
        for number, each in enumerate(passed):
            inputs = distinct(x)
            caught.append([[] for _ in inputs])
            boxes = iter(caught[-1])
            taken = map_distinct(partial(_take, boxes), x)
            x = self._forward(number, taken, target, each, counted)
            given.append(distinct(x))
            each.input_bytes = sum(tensor.nbytes for tensor in inputs)
            each.output_bytes = sum(tensor.nbytes for tensor in given[-1])
            each.packed_bytes = each.output_bytes if len(given[-1]) > 1 else 0
        del x, taken, inputs
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
            errors = [box[0] if box else None for box in caught.pop()]
            if number > 0:
                passed[number].error_bytes = sum(e.nbytes for e in errors if e is not None)
            for parameter in self._layers[number].parameters():
                parameter.grad = None
        return _Pass(passed)

    def _forward(
        self,
        number: int,
        value: Nested,
        target: Nested,
        passed: _Passed,
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
