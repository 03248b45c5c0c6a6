"""Where to cut a chain of layers into stages."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batch
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.chain import check_loss, check_output
from fdg_cuda.errors import said_where
from fdg_cuda.nested import Nested, map_tensors, tensors
from fdg_cuda.precision import Precision

logger = logging.getLogger("fdg_cuda")

REPEATS = 7


def check_split(split: Sequence[int], layers: int, stages: int) -> list[int]:
    """``split`` as a list, if it can cut ``layers`` layers into ``stages`` stages.

    Raises:
        ValueError: wrong number of indices, out of order, or out of range.
    """
    if isinstance(split, (str, int)) or not all(isinstance(index, int) for index in split):
        raise ValueError(
            f"split must be a list of layer numbers, such as [3, 7], or None to measure "
            f"where to cut; got {split!r}"
        )
    cuts = list(split)
    if len(cuts) != stages - 1:
        raise ValueError(
            f"split must name {stages - 1} of the layers, where stages 1, 2, ... begin (one less "
            f"than there are devices); got {cuts}"
        )
    if any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"split indices must increase; got {cuts}")
    if cuts and (cuts[0] < 1 or cuts[-1] >= layers):
        raise ValueError(
            f"split indices must lie between 1 and {layers - 1}, since the chain has {layers} "
            f"layers and every stage needs at least one; got {cuts}"
        )
    return cuts


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """The cut of layers with these costs into ``stages`` contiguous parts whose costliest part is
    as cheap as possible. Exact, by dynamic programming; of equal cuts the earliest.

    Returns:
        ``stages - 1`` indices at which parts 1, 2, ... begin.

    Raises:
        ValueError: fewer layers than stages.
    """
    n = len(costs)
    if n < stages:
        raise ValueError(f"{n} layers cannot be cut into {stages} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    infinite = float("inf")
    # best[i]: the smallest possible costliest part of layers 0..i-1 in the parts so far
    best = [*sums[:1], *[infinite] * n]
    choices: list[list[int]] = []
    for _ in range(stages):
        following = [infinite] * (n + 1)
        choice = [0] * (n + 1)
        for end in range(1, n + 1):
            for begin in range(end):
                cost = max(best[begin], sums[end] - sums[begin])
                if best[begin] < infinite and cost < following[end]:
                    following[end], choice[end] = cost, begin
        best = following
        choices.append(choice)
    cuts: list[int] = []
    end = n
    for choice in reversed(choices[1:]):
        end = choice[end]
        cuts.append(end)
    return cuts[::-1]


def measure(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: Callable[[Tensor, Nested], Tensor],
    *,
    threads: int,
    precision: Precision = Precision.FLOAT32,
    synchronize: Callable[[], object] = lambda: None,
    random_devices: Sequence[int] = (),
) -> list[float]:
    """Seconds each layer takes for forward plus backward on ``batch``; the loss counts to the last.

    The smallest of repeated passes, since whatever else the machine does only adds. Leaves no
    trace: buffers, gradients, the global random state and the thread count are as before.

    Args:
        threads: intra-op threads to measure with.
        precision: in which layers and loss compute.
        synchronize: waits until the device has done what it was given.
        random_devices: CUDA devices whose random state is to be as before.
    """
    buffers = SavedBuffers(layers)
    gradients = [(p, p.grad) for layer in layers for p in layer.parameters()]
    previous_threads = torch.get_num_threads()
    seconds: list[list[float]] = [[] for _ in layers]
    try:
        torch.set_num_threads(threads)
        with torch.random.fork_rng(devices=list(random_devices)), torch.enable_grad():
            for _ in range(REPEATS + 1):
                passed = _one_pass(layers, batch, loss, precision, synchronize)
                for times, elapsed in zip(seconds, passed, strict=True):
                    times.append(elapsed)
    finally:
        torch.set_num_threads(previous_threads)
        buffers.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
    # The first pass warms up allocator and kernels.
    return [min(times[1:]) for times in seconds]


def _one_pass(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: Callable[[Tensor, Nested], Tensor],
    precision: Precision,
    synchronize: Callable[[], object],
) -> list[float]:
    def now() -> float:
        synchronize()
        return time.perf_counter()

    def autocast() -> AbstractContextManager[object]:
        return precision.autocast(tensors(batch[0])[0].device.type)

    x, target = batch
    # Copies, since a layer may work in place on its input.
    inputs: list[Nested] = []
    outputs: list[Tensor] = []
    seconds: list[float] = []
    for number, layer in enumerate(layers):
        leaf = map_tensors(torch.detach, x)
        if number > 0 and (leaf.is_floating_point() or leaf.is_complex()):
            leaf.requires_grad_()
        value = map_tensors(torch.clone, leaf)
        begin = now()
        with (
            said_where(f"layer {number}, a {type(layer).__name__}, at the first batch"),
            autocast(),
        ):
            output = check_output(layer(value), f"layer {number}")
        if number == len(layers) - 1:
            with said_where("the loss of the first batch"), autocast():
                output = check_loss(loss(output, target), 0)
        seconds.append(now() - begin)
        inputs.append(leaf)
        outputs.append(output)
        x = output
    error: Tensor | None = None
    for number in reversed(range(len(layers))):
        begin = now()
        if outputs[number].requires_grad and (error is not None or number == len(layers) - 1):
            torch.autograd.backward([outputs[number]], [error])
        seconds[number] += now() - begin
        error = inputs[number].grad if number > 0 else None
        for parameter in layers[number].parameters():
            parameter.grad = None
    return seconds
