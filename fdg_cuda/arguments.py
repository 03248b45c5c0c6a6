"""What can be said of a runner's arguments before anything is made of them."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch

from fdg_cuda.backward_weights import BackwardWeights

BACKWARD_WEIGHTS = tuple(mode.value for mode in BackwardWeights)


def check_backward_weights(value: str) -> None:
    """Raises:
    ValueError: an unknown choice.
    """
    if value not in BACKWARD_WEIGHTS:
        raise ValueError(
            f"backward_weights must be one of {', '.join(BACKWARD_WEIGHTS)}; got {value!r}"
        )


def check_loss(loss_fn: object) -> None:
    """Raises:
    TypeError: not what can be called with output and target.
    """
    if isinstance(loss_fn, type):
        raise TypeError(
            f"loss_fn must be a function of output and target; got the class {loss_fn.__name__}. Give "
            f"an instance: loss_fn={loss_fn.__name__}()"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function of output and target, such as "
            f"torch.nn.functional.mse_loss; got {loss_fn!r}"
        )


def check_fit(epochs: SupportsIndex, lr_step: str) -> int:
    """How many epochs, as a plain number, whichever library's it is.

    Raises:
        TypeError, ValueError: an argument of ``fit`` that cannot be.
        RuntimeError: torch is in a mode in which stages cannot train.
    """
    try:
        epochs = operator.index(epochs)
    except TypeError:
        if not hasattr(epochs, "__len__") or isinstance(epochs, str):
            raise TypeError(f"epochs must be a whole number; got {epochs!r}") from None
        raise TypeError(
            f"epochs must be a whole number; got a {type(epochs).__name__}. fit(loader, epochs) takes "
            f"batches as a loader that yields pairs (input, target), such as [(x, y)]"
        ) from None
    if epochs < 0:
        raise ValueError(f"epochs must be 0 or more; got {epochs}")
    if lr_step not in ("epoch", "batch"):
        raise ValueError(f"lr_step must be 'epoch' or 'batch'; got {lr_step!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fit cannot train under torch.inference_mode(); call it outside")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError(
            "torch.autocast around fit does not reach the stages, which have settings of their own; "
            "give FDGRunner(..., precision='bfloat16') or 'float16' instead"
        )
    return epochs
