"""What each layer of a chain costs: seconds, and bytes kept and handed on, for one batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batch
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.flat import padded_bytes
from fdg_cuda.layer_passes import LayerByLayer, Pass
from fdg_cuda.nested import tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision
from fdg_cuda.saved_bytes import SavedBytes

# Passes behind the one that warms up.
MOST_PASSES, LEAST_PASSES = 9, 3
# No more passes than the least behind so many seconds, and none that would end beyond the limit, not
# even one behind the first: what warms up is little of a pass that long.
ENOUGH_SECONDS, LIMIT_SECONDS = 6.0, 12.0
EMPTY_LAYERS = 20  # that count; as many before and behind them


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
    chain = LayerByLayer(layers, batch, loss, precision, synchronize)
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


@dataclass(frozen=True)
class _Overhead:
    """Seconds that a layer takes by being run one by one, whatever it does."""

    forward: float
    backward: float


def _overhead(
    device: torch.device, precision: Precision, synchronize: Callable[[], object]
) -> _Overhead:
    """Of layers that do nothing."""
    empty = [nn.Identity() for _ in range(3 * EMPTY_LAYERS)]
    chain = LayerByLayer(
        [layer.to(device) for layer in (nn.Linear(1, 1), *empty, nn.Linear(1, 1))],
        (torch.ones(1, 1, device=device), None),
        lambda output, _: output.sum(),
        precision,
        synchronize,
    )
    passed = chain.run().layers[EMPTY_LAYERS:-EMPTY_LAYERS]  # others warm up, in either direction
    return _Overhead(
        statistics.median(layer.forward for layer in passed),
        statistics.median(layer.backward for layer in passed),
    )


def _seconds(passes: Sequence[Pass], direction: str, overhead: _Overhead) -> list[float]:
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
    first: Callable[[], Pass],
    again: Callable[[], Pass],
    patience: float = 1.0,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Pass]:
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
