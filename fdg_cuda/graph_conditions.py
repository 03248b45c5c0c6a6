"""What speaks against capturing layers as a graph, and what a captured graph does not follow."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fdg_cuda.graph_stage import modes_of
from fdg_cuda.mail import addresses
from fdg_cuda.torch_facts import has_hooks


def why_not_captured(layers: Sequence[nn.Module]) -> str | None:
    """What speaks against capturing ``layers`` before it is tried."""
    for layer in layers:
        for module in layer.modules():
            if has_hooks(module):
                return f"a {type(module).__name__} has hooks, which a graph would not call"
    return None


def baked_in(layers: Sequence[nn.Module]) -> object:
    """What a graph of ``layers`` has baked in and a caller may change between two epochs."""
    return [
        (
            str(layer),
            modes_of(layer),
            addresses(list(layer.buffers())),
            [(p.data_ptr(), p.requires_grad) for p in layer.parameters() if not p.requires_grad],
            why_not_captured([layer]),
        )
        for layer in layers
    ]


def place_in_model(error: BaseException) -> str:
    """Where in the model ``error`` arose, as " (at file.py:12: code)"; empty if nowhere there."""
    ours = (Path(__file__).parent, Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(folder in Path(frame.filename).parents for folder in ours):
            return f" (at {Path(frame.filename).name}:{frame.lineno}: {frame.line})"
    return ""
