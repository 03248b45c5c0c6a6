"""safetensors files, written and read tensor by tensor, with a checksum if asked for.

The format: 8 bytes little-endian with the header's length; the header, JSON padded with spaces; the
data. ``safetensors.torch.load_file`` reads what is written here. The package itself is not used: it
holds the file in memory two more times, writes metadata in an order that changes from one process
to the next, and knows no checksum. Here one tensor is in memory besides those given, the same
content gives the same bytes, and what is checked are the very bytes that were loaded.

The checksum is the metadata's first entry, so at a fixed place: the SHA-256 of the whole file with
its own 64 digits as zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

import torch
from torch import Tensor

LARGEST_HEADER = 100_000_000  # bytes; the safetensors package reads no larger one

# In the order in which safetensors lays tensors out, which keeps all of them aligned.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

_CHECKSUM = "checksum"
_PREFIX = b'{"__metadata__":{"checksum":"'
_DIGITS = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 64)
_ZEROS = "0" * 64


class BrokenFileError(ValueError):
    """A file is no safetensors file, or is damaged. The message goes on behind the file's name."""


@dataclass(frozen=True)
class Header:
    """What stands before the data.

    Attributes:
        metadata: text by key.
        entries: what the file says of each tensor, unchecked.
        raw: the bytes themselves, the length included.
        file_bytes: size of the whole file.
    """

    metadata: dict[str, str]
    entries: dict[str, Any]
    raw: bytes
    file_bytes: int

    def tensors(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape by key, in the order of the data, which lie without gaps to the end.

        Raises:
            BrokenFileError: the header says otherwise, or the file has another size.
        """
        end = 0
        result = {}
        try:
            for key, entry in self.entries.items():
                result[key], end = _entry(entry, end)
        except (ValueError, TypeError, KeyError) as error:
            raise BrokenFileError(f"is damaged in its header, at tensor {key!r}") from error
        written = len(self.raw) + end
        if written != self.file_bytes:
            what = "truncated" if written > self.file_bytes else "too long"
            raise BrokenFileError(
                f"is {what}: {written} bytes were written, {self.file_bytes} are there"
            )
        return result


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    checksum: bool = False,
) -> None:
    """Write ``tensors`` and ``metadata`` to ``file``, which is empty.

    Args:
        tensors: of any device, layout in memory and shape; they come back contiguous, on the CPU.
            Must not be written to in the meantime.
        metadata: text by key; stored in alphabetical order.
        checksum: add what :func:`read` needs, under the metadata's key "checksum".

    Raises:
        TypeError: a tensor that the format cannot hold. Nothing is written.
        ValueError: a key or metadata that the format cannot hold. Nothing is written.
        OSError: from ``file``.
    """
    ordered = _laid_out(tensors)
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str) or key == _CHECKSUM:
            raise ValueError(f"metadata are text by a key other than {_CHECKSUM!r}; got {key!r}")
    head = _head(ordered, dict(sorted(metadata.items())), checksum)
    digest = hashlib.sha256(head)
    file.write(head)
    for tensor in ordered.values():
        content = _bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())
        digest.update(content)
        file.write(content)
    if checksum:
        file.seek(_DIGITS.start)
        file.write(digest.hexdigest().encode())


def read_header(file: BufferedReader) -> Header:
    """The header of ``file``, which is at its beginning; the data are not read.

    Raises:
        BrokenFileError: it is no safetensors file, or damaged.
        OSError: from ``file``.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    if not file_bytes:
        raise BrokenFileError("is empty")
    start = file.read(9)
    size = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or not 2 <= size <= LARGEST_HEADER:
        raise BrokenFileError("is no safetensors file, or damaged in its first bytes")
    raw = start + file.read(size - 1)
    if len(raw) < 8 + size:
        raise BrokenFileError(f"is truncated: {file_bytes} bytes are not even its header")
    try:
        entries = json.loads(raw[8:])
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BrokenFileError(
            f"is no safetensors file, or damaged in its header: {error}"
        ) from error
    return Header(metadata, entries, raw, file_bytes)


def read(file: BufferedReader, header: Header) -> dict[str, Tensor]:
    """The tensors of ``file``, from which ``header`` was just read, on the CPU.

    Raises:
        BrokenFileError: the file is damaged, or was written without a checksum.
        OSError: from ``file``.
    """
    layout = header.tensors()
    said = header.metadata.get(_CHECKSUM)
    if said is None:
        raise BrokenFileError("has no checksum, or is damaged there")
    digest = hashlib.sha256(header.raw[: _DIGITS.start] + _ZEROS.encode())
    digest.update(header.raw[_DIGITS.stop :])
    tensors = {}
    for key, (dtype, shape) in layout.items():
        tensors[key] = torch.empty(shape, dtype=dtype)
        content = _bytes_of(tensors[key])
        if file.readinto(content) != len(content):
            raise BrokenFileError("became shorter while it was read")
        digest.update(content)
    if digest.hexdigest() != said:
        raise BrokenFileError("is damaged: its content does not fit its checksum")
    return tensors


def _laid_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"tensors are held by text; got {key!r}: {type(tensor).__name__}")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise TypeError(
                f"tensor {key!r} is {tensor.dtype}, {tensor.layout}: a safetensors file holds dense "
                f"tensors of {', '.join(str(dtype) for dtype in _NAMES)}"
            )
        if key == "__metadata__":
            raise ValueError("no tensor can be called '__metadata__' in a safetensors file")
    return dict(sorted(tensors.items(), key=lambda item: (_RANKS[item[1].dtype], item[0])))


def _head(tensors: Mapping[str, Tensor], metadata: dict[str, str], checksum: bool) -> bytes:
    if checksum:
        metadata = {_CHECKSUM: _ZEROS, **metadata}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise ValueError(
            f"the header would have {len(text)} bytes, {LARGEST_HEADER} is the most a safetensors "
            f"file may have: put long lists of numbers into tensors"
        )
    return len(text).to_bytes(8, "little") + text


def _entry(entry: dict[str, Any], begin: int) -> tuple[tuple[torch.dtype, list[int]], int]:
    """Dtype and shape of a tensor whose data start at ``begin``, and where they end."""
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"a shape of {shape}")
    end = begin + math.prod(shape) * dtype.itemsize
    if entry["data_offsets"] != [begin, end]:
        raise ValueError(f"data at {entry['data_offsets']}, not {[begin, end]}")
    return (dtype, shape), end


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
