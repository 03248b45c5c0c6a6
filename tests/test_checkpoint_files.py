"""One checkpoint as a file: it comes back to the bit, or an error says what is wrong with it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdg_cuda import checkpoint_file, tensor_file
from fdg_cuda.checkpoint_file import Checkpoint, file_name, load_checkpoint, write_checkpoint
from fdg_cuda.errors import CheckpointError
from fdg_cuda.weights import save_weights

TENSORS = {"w": torch.tensor([1.5, -2.0]), "steps": torch.tensor(7)}
STATE = {"epoch": 3, "seed": [1, 2]}


def written(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
    step: int = 12,
    metric: float | None = 0.5,
) -> Path:
    path = folder / file_name(step)
    write_checkpoint(
        path, step, TENSORS if tensors is None else tensors, state or STATE, metric=metric
    )
    return path


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes()


def every_kind_of_tensor() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=random)
    tensors = {
        str(dtype): torch.randint(0, 255, (3, 5), dtype=torch.uint8, generator=random).to(dtype)
        for dtype in tensor_file.DTYPES.values()
    }
    return {
        **tensors,
        "0-d": torch.tensor(math.pi, dtype=torch.float64),
        "0-d bool": torch.tensor(True),
        "none": torch.empty(0),
        "none of bfloat16": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "special": torch.tensor([math.inf, -math.inf, math.nan, -0.0, 5e-324], dtype=torch.float64),
        "channels last": image.to(memory_format=torch.channels_last),
        "not contiguous": image.transpose(1, 3)[:, ::2],
        "the same memory": image,
        "conjugated": torch.randn(3, dtype=torch.complex64, generator=random).conj(),
        "parameter": torch.nn.Parameter(image[0]),
        'any text: é " \\ \n 🙂': torch.ones(1),
        "": torch.ones(2),
    }


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    tensors = every_kind_of_tensor()
    before = {key: bits(tensor.resolve_conj()) for key, tensor in tensors.items()}
    path = written(tmp_path, tensors)
    got = load_checkpoint(path)
    assert (got.path, got.step, got.metric) == (path, 12, 0.5)
    assert {key: bits(tensor) for key, tensor in got.tensors.items()} == before
    assert all(tensor.is_contiguous() for tensor in got.tensors.values())


def test_the_safetensors_package_reads_a_checkpoint(tmp_path: Path) -> None:
    tensors = every_kind_of_tensor()
    path = written(tmp_path, tensors)
    plain = load_file(path)
    assert {key: bits(tensor) for key, tensor in plain.items()} == {
        key: bits(tensor.resolve_conj()) for key, tensor in tensors.items()
    }
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["state"]) == STATE


def test_tensors_are_aligned_in_the_file(tmp_path: Path) -> None:
    with written(tmp_path, every_kind_of_tensor()).open("rb") as file:
        header = tensor_file.read_header(file)
    for key, (dtype, _) in header.tensors().items():
        begin = len(header.raw) + header.entries[key]["data_offsets"][0]
        assert begin % dtype.itemsize == 0


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = every_kind_of_tensor()
    first = written(tmp_path, tensors).read_bytes()
    assert written(tmp_path, dict(reversed(tensors.items()))).read_bytes() == first
    assert written(tmp_path, tensors, metric=None).read_bytes() != first


def same(first: object, second: object) -> bool:
    """Equal in type and, for floats, in every bit; one NaN is like another."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and isinstance(second, float):
        if math.isnan(first):
            return math.isnan(second)
        return struct.pack("d", first) == struct.pack("d", second)
    return first == second


texts = st.text(st.characters(codec=None))  # lone surrogates too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(texts, values, max_size=4), st.none() | st.floats())
def test_state_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any], metric: float | None
) -> None:
    path = tmp_path_factory.getbasetemp() / file_name(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        write_checkpoint(path, 1, {}, state, metric)
    got = load_checkpoint(path)
    assert same(got.state, state)
    assert same(got.metric, metric)


def test_nothing_at_all_is_a_checkpoint_too(tmp_path: Path) -> None:
    path = tmp_path / "under another name"
    write_checkpoint(path, 0, {}, {}, None)
    assert load_checkpoint(str(path)) == Checkpoint(path, 0, {}, {}, None)


def loads(path: Path, content: bytes) -> bool:
    """Whether ``content`` is a checkpoint; if it is none, the error names the file."""
    path.write_bytes(content)
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert message.startswith(str(path))
    return False


@pytest.mark.parametrize("flip", [0x01, ord(" ") ^ ord("\t"), 0xFF])
def test_every_changed_byte_is_found(tmp_path: Path, flip: int) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= flip
        assert not loads(path, changed), f"byte {place} of {len(content)}"
    assert loads(path, content)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        assert not loads(path, content[:length]), f"{length} of {len(content)} bytes"
    assert not loads(path, content + b"\0")


def test_swapped_contents_are_found(tmp_path: Path) -> None:
    """Header and data that are each whole, of different checkpoints."""
    path = written(tmp_path)
    first = path.read_bytes()
    second = written(tmp_path, {**TENSORS, "w": torch.tensor([1.5, 2.0])}).read_bytes()
    assert len(first) == len(second)
    data = len(first) - 16
    assert not loads(path, first[:data] + second[data:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("these are no weights at all, whatever the name says")


def folder(path: Path) -> None:
    path.mkdir()


def missing(path: Path) -> None:
    pass


def weights(path: Path) -> None:
    save_weights(path, TENSORS, {"model": "resnet20"})


def foreign(path: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.ones(3)}, path)


def foreign_dtype(path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")


def pickled(path: Path) -> None:
    torch.save(TENSORS, path)


def newer(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_file, "FORMAT_VERSION", "2")
        write_checkpoint(path, 12, TENSORS, STATE, None)


def unchecked(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        write = tensor_file.write
        patch.setattr(tensor_file, "write", lambda *args, checksum: write(*args))
        write_checkpoint(path, 12, TENSORS, STATE, None)


def renamed(path: Path) -> None:
    write_checkpoint(path, 13, TENSORS, STATE, None)


def truncated(path: Path) -> None:
    write_checkpoint(path, 12, TENSORS, STATE, None)
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    write_checkpoint(path, 12, TENSORS, STATE, None)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def nested(path: Path) -> None:
    path.write_bytes((100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (empty, "is empty"),
        (text, "is no safetensors file"),
        (pickled, "is no safetensors file"),
        (nested, "is no safetensors file"),
        (folder, "is no file"),
        (missing, "cannot be read: No such file"),
        (weights, "weights alone do not continue a run"),
        (foreign, "no checkpoint of fdg_cuda"),
        (foreign_dtype, "no checkpoint of fdg_cuda"),
        (newer, "is of format version 2, and this fdg_cuda reads version 1"),
        (unchecked, "has no checksum"),
        (renamed, "holds step 13: it was renamed"),
        (truncated, r"is truncated: \d+ bytes were written, \d+ are there"),
        (flipped, "content does not fit its checksum"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, make: Any, expected: str) -> None:
    path = tmp_path / file_name(12)
    make(path)
    with pytest.raises(CheckpointError, match=expected) as raised:
        load_checkpoint(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("tensors", "state", "kind", "expected"),
    [
        ({}, {"lr": {"at": [1, (2, 3)]}}, TypeError, r"state\['lr'\]\['at'\]\[1\] is a tuple"),
        ({}, {"a": {1: 2}}, TypeError, r"state\['a'\] has the key 1"),
        ({}, {"a": torch.ones(1)}, TypeError, r"state\['a'\] is a Tensor"),
        ({"w": torch.ones(1).to_sparse()}, {}, TypeError, "'w' is torch.float32, torch.sparse_coo"),
        ({"w": torch.ones(1, dtype=torch.complex128)}, {}, TypeError, "torch.complex128"),
        ({"w": [1.0]}, {}, TypeError, "'w': list"),
        ({3: torch.ones(1)}, {}, TypeError, "held by text; got 3"),
        ({"__metadata__": torch.ones(1)}, {}, ValueError, "__metadata__"),
        ({"\ud800": torch.ones(1)}, {}, ValueError, "surrogates"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_and_nothing_touched(
    tmp_path: Path, tensors: Any, state: Any, kind: type[Exception], expected: str
) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(kind, match=expected):
        write_checkpoint(path, 12, tensors, state, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_header_that_no_one_could_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="put long lists of numbers into tensors"):
        written(tmp_path, state={"losses": [0.1] * 1000})
    assert not list(tmp_path.iterdir())
