"""In which floating-point format stages compute. No torch at import."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING

from fdg_cuda.names import did_you_mean

if TYPE_CHECKING:
    from torch import nn


class Precision(Enum):
    """float32: as the model's dtype says. The others: forward and loss under ``torch.autocast``, over
    float32 weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def scales_loss(self) -> bool:
        """Whether small gradients would be lost without a scaled loss."""
        return self is Precision.FLOAT16

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """What a stage's layers and the loss run in, on devices of ``device_type``.

        Without autocast's cache of cast weights: it is the whole process's, so that another stage's
        thread empties it in the middle of a forward, and whether a weight that is used twice is cast
        once or twice would depend on timing. Nor could a captured graph hold what it keeps.
        """
        if self is Precision.FLOAT32:
            return nullcontext()
        import torch

        return torch.autocast(device_type, getattr(torch, self.value), cache_enabled=False)


PRECISIONS = tuple(precision.value for precision in Precision)


def parse_precision(value: object, model: nn.Module) -> Precision:
    """The precision that ``value`` (a name, or torch's dtype of that name) means, in which ``model``
    can be trained.

    Raises:
        ValueError: an unknown one, or one that would do nothing to a float64 model.
    """
    import torch

    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if name not in PRECISIONS:
        hint = did_you_mean(name, PRECISIONS) if isinstance(name, str) else ""
        known = ", ".join(PRECISIONS)
        raise ValueError(f"precision must be one of {known}; got {value!r}.{hint}")
    precision = Precision(name)
    if precision is Precision.FLOAT32:
        return precision
    double = [name for name, p in model.named_parameters() if p.dtype == torch.float64]
    if double:
        raise ValueError(
            f"precision={name!r} casts float32 layers, but parameter {double[0]} is torch.float64, "
            f"which autocast leaves as it is; convert the model with model.float(), or leave "
            f"precision out"
        )
    return precision
