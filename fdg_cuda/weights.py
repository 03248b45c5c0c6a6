"""Trained weights as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fdg_cuda import tensor_file
from fdg_cuda.files import replacing


def save_weights(path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``state_dict`` under its own keys to ``path``, replacing the file in one step.

    The same tensors and metadata give the same bytes. ``safetensors.torch.load_file`` reads the
    tensors, ``safetensors.safe_open(...).metadata()`` the metadata.

    Raises:
        TypeError, ValueError: a tensor or metadata that the format cannot hold.
        OSError: the file cannot be written.

    In each case what was there before still is.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        tensor_file.write(file, state_dict, metadata)


def finite(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether no tensor of ``state_dict`` holds NaN or infinity."""
    return all(bool(torch.isfinite(value).all()) for value in state_dict.values())
