"""A checkpoint of a training run as a file.

It is a safetensors file, ``checkpoint-000000123.safetensors`` behind 123 batches, whose tensors
``safetensors.torch.load_file`` reads on any machine. No pickle. Its metadata:

| key | text |
|---|---|
| ``checksum`` | SHA-256 of the whole file with these 64 digits as zeros (see ``tensor_file.py``) |
| ``format`` | ``fdg_cuda checkpoint`` |
| ``format_version`` | ``1`` |
| ``metric`` | a float in Python's spelling; absent without one |
| ``state`` | JSON in Python's dialect, which has ``NaN``, ``Infinity`` and ``-Infinity`` |
| ``step`` | batches trained so far |
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from torch import Tensor

from fdg_cuda import tensor_file
from fdg_cuda.errors import CheckpointError
from fdg_cuda.files import replacing

FORMAT = "fdg_cuda checkpoint"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        step: batches trained so far in the whole run.
        tensors: by key; contiguous, on the CPU.
        state: plain JSON values, floats exact to the bit (but one NaN is like another).
        metric: what the best is chosen by, higher is better; None without one.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    metric: float | None


@dataclass(frozen=True)
class Summary:
    """What the header of a checkpoint file says; its data may still be damaged."""

    path: Path
    step: int
    metric: float | None


def file_name(step: int) -> str:
    """The name of the checkpoint behind ``step`` batches."""
    return f"checkpoint-{step:09d}.safetensors"


def step_in(name: str) -> int | None:
    """The step in a checkpoint's file name; None if ``name`` is none."""
    match = re.fullmatch(r"checkpoint-(\d{9,})\.safetensors", name, re.ASCII)
    return int(match[1]) if match and file_name(int(match[1])) == name else None


def write_checkpoint(
    path: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    metric: float | None,
) -> None:
    """Write a checkpoint to ``path``, replacing it in one step, on the disk when this returns.

    The same arguments give the same bytes. For what they are see :meth:`CheckpointFolder.save`.

    Raises:
        TypeError, ValueError: an argument that cannot be stored.
        OSError: the file cannot be written.

    In each case what was there before still is.
    """
    plain = dict(state)
    _check_plain(plain, "state")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state": json.dumps(plain, separators=(",", ":")),
        "step": str(step),
    }
    if metric is not None:
        metadata["metric"] = repr(float(metric))
    with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
        tensor_file.write(file, tensors, metadata, checksum=True)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, and check every bit of it.

    Raises:
        CheckpointError: there is none, or it is damaged, or another kind of file; the message names
            the file, what is wrong and what to do.
    """
    with _opened(Path(path)) as (file, header, summary):
        tensors = tensor_file.read(file, header)
        state = json.loads(header.metadata["state"])
        return Checkpoint(summary.path, summary.step, tensors, state, summary.metric)


def read_summary(path: Path) -> Summary:
    """What the header of a checkpoint says; the data are not read.

    Raises:
        CheckpointError: as :func:`load_checkpoint`, but for what only the data tell.
    """
    with _opened(path) as (_, _, summary):
        return summary


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, tensor_file.Header, Summary]]:
    """The file, read up to the data; all troubles with it are CheckpointErrors."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no file. Give the path of a checkpoint file.")
        with path.open("rb") as file:
            header = tensor_file.read_header(file)
            yield file, header, _summary(path, header)
    except tensor_file.BrokenFileError as error:
        raise CheckpointError(f"{path} {error}; another checkpoint may be whole.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _summary(path: Path, header: tensor_file.Header) -> Summary:
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but no checkpoint of fdg_cuda (weights alone do not "
            f"continue a run). Give a file that was written as a checkpoint."
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format version {version}, and this fdg_cuda reads version "
            f"{FORMAT_VERSION}. Use the fdg_cuda that wrote it, or a newer one."
        )
    header.tensors()
    try:
        step = int(metadata["step"])
        metric = float(metadata["metric"]) if "metric" in metadata else None
    except (KeyError, ValueError) as error:
        raise tensor_file.BrokenFileError("is damaged in its metadata") from error
    if step_in(path.name) not in (step, None):
        raise CheckpointError(
            f"{path} holds step {step}: it was renamed, or is damaged. Give it its own name back."
        )
    return Summary(path, step, metric)


def _check_plain(value: object, place: str) -> None:
    if type(value) is dict:
        for key, each in value.items():
            if type(key) is not str:
                raise TypeError(f"{place} has the key {key!r}: keys must be text, as JSON's are")
            _check_plain(each, f"{place}[{key!r}]")
    elif type(value) is list:
        for index, each in enumerate(value):
            _check_plain(each, f"{place}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(
            f"{place} is a {type(value).__name__}: only dict, list, str, int, float, bool and None "
            f"come back from JSON as what they were"
        )
