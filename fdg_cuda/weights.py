"""Trained weights as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fdg_cuda.report import replacing


def save_weights(path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``state_dict`` under its own keys to ``path``, replacing the file in one step.

    The same tensors and metadata give the same bytes. ``safetensors.torch.load_file`` reads the
    tensors, ``safetensors.safe_open(...).metadata()`` the metadata.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    from safetensors.torch import save

    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    content = _sorted_header(save(tensors, metadata=dict(metadata)))
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def finite(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether no tensor of ``state_dict`` holds NaN or infinity."""
    return all(bool(torch.isfinite(value).all()) for value in state_dict.values())


def _sorted_header(content: bytes) -> bytes:
    """``content`` of a safetensors file with its metadata in alphabetical order.

    safetensors writes metadata in an order that changes from one process to the next. The format:
    8 bytes little-endian with the header's length, the header (JSON, padded with spaces), the data.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
