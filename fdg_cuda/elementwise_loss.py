"""Losses of torch that compare element by element, and broadcast: MSE, L1 and Huber's."""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def without_broadcast(loss_fn: Any) -> Any:
    """``loss_fn``, or, if torch's own of this kind, one that refuses a target of another shape than the
    output's, ``(N,)`` for ``(N, 1)``: torch compares each output with every target then, and warns. With
    one sample both are the same.

    The loss raises:
        ValueError: such a target.
    """
    if not (any(loss_fn is each for each in FUNCTIONS) or type(loss_fn) in MODULES):
        return loss_fn
    named = type(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn

    def checked(output: Any, target: Any) -> Any:
        both = isinstance(output, Tensor) and isinstance(target, Tensor)
        if both and output.shape != target.shape and target.numel() != 1:
            alike = output.numel() == target.numel()
            such = f", such as target.reshape({tuple(output.shape)})" if alike else ""
            raise ValueError(
                f"the model's output has shape {tuple(output.shape)}, the target {tuple(target.shape)}; "
                f"{named.__name__} compares element by element and would compare each with many. Give "
                f"targets of the output's shape{such}; or, if that is meant, a loss_fn= of your own"
            )
        return loss_fn(output, target)

    return update_wrapper(checked, named, updated=())
