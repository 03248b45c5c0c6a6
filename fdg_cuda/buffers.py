"""Modules' buffers (BatchNorm statistics and the like) saved and put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Saved:
    module: nn.Module
    name: str
    buffer: Tensor | None
    value: Tensor | None


class SavedBuffers:
    """The buffers of ``layers`` as they are now. A module may meanwhile replace one by another
    tensor, or set one that was None: ``restore`` undoes that too."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        modules = {id(m): m for layer in layers for m in layer.modules()}.values()
        self._saved = [
            _Saved(module, name, buffer, None if buffer is None else buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for saved in self._saved:
                if saved.buffer is not None and saved.value is not None:
                    # Through `data`: batches in flight may have saved the buffer for their
                    # backward, which does not read it, and would take this for a change.
                    saved.buffer.data.copy_(saved.value)
                saved.module._buffers[saved.name] = saved.buffer
