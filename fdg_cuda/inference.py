"""The whole model in evaluation mode: what a runner evaluates and predicts with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batches, Loader
from fdg_cuda.metrics import Average, Evaluation, count_correct


def evaluate(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loader: Loader,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Evaluation:
    """Loss and accuracy of ``model``, called by ``forward``, over ``loader``, averaged over samples.

    Raises:
        TypeError, ValueError: the loader gives no (input, target) pairs.
    """
    average = Average()
    with _inference(model):
        for x, y in Batches(loader).epoch():
            output = forward(x.clone())  # its first layer may work in place
            y = y.to(output.device)
            average.add(float(loss_fn(output, y)), len(x), count_correct(output, y))
    return average.result()


def predict(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``model``'s output for ``x``, on ``x``'s device and without gradient.

    Raises:
        TypeError: ``x`` is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"predict takes a tensor; got a {type(x).__name__}. For a loader: "
            f"torch.cat([runner.predict(x) for x, _ in loader])"
        )
    with _inference(model):
        return forward(x.clone()).to(x.device)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
