"""Measured costs of layers, and of updates, remembered.

Times differ a little from one measurement to the next, and with them the cut, and with the cut the
trained weights. Remembering them makes the same command give the same bits on the same machine
every time, and saves measuring again. The file is ``layer_times.json`` in ``$FDG_CACHE_DIR``, else in
``$XDG_CACHE_HOME/fdg_cuda``, else in ``~/.cache/fdg_cuda``; delete it to measure anew. With
``FDG_CACHE_DIR`` set to nothing, times are remembered within the process only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batch
from fdg_cuda.costs import LayerCost
from fdg_cuda.graph_stage import GraphStage, modes_of
from fdg_cuda.nested import map_tensors
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision

Measured = TypeVar("Measured")

logger = logging.getLogger("fdg_cuda")

METHOD = 4  # of measuring: what was measured by another one does not count

_known: dict[str, Any] = {}
# Inside of `anew`: the keys that were measured there.
_measured_anew: ContextVar[set[str] | None] = ContextVar("measured anew", default=None)


def cache_file() -> Path | None:
    """Where costs are kept; None if they are not to be."""
    folder = os.environ.get("FDG_CACHE_DIR")
    if folder is not None:
        return Path(folder) / "layer_times.json" if folder else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fdg_cuda" / "layer_times.json"


def remembered(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: LossFunction,
    threads: int,
    measure: Callable[[], list[LayerCost]],
    *,
    device: str = "cpu",
    precision: Precision = Precision.FLOAT32,
) -> list[LayerCost]:
    """The cost of each layer as measured earlier under the same circumstances, else ``measure()``."""
    key = _key(layers, batch, loss, threads, device, precision)
    return _recalled(
        key, measure, pack=_packed, unpack=lambda stored: _unpacked(stored, len(layers))
    )


def remembered_number(
    what: str, threads: int, measure: Callable[[], float], *, device: str = "cpu"
) -> float:
    """As :func:`remembered`, of something that is a matter of the machine only."""
    key = _hashed([*_machine(threads, device), what])

    def unpacked(stored: Any) -> float | None:
        column: Any = stored.get(what) if isinstance(stored, dict) else None
        return float(column[0]) if _are_numbers(column) and len(column) == 1 else None

    return _recalled(key, measure, pack=lambda number: {what: [number]}, unpack=unpacked)


def _recalled(
    key: str,
    measure: Callable[[], Measured],
    *,
    pack: Callable[[Measured], dict[str, list[float]]],
    unpack: Callable[[Any], Measured | None],
) -> Measured:
    fresh = _measured_anew.get()
    if fresh is not None and key not in fresh:
        fresh.add(key)
        measured = measure()
        _write(key, pack(measured))
        _known[key] = measured
    elif key not in _known:
        stored = unpack(_read().get(key))
        if stored is None:
            stored = measure()
            _write(key, pack(stored))
        _known[key] = stored
    known: Measured = _known[key]
    return known


@contextmanager
def anew() -> Iterator[None]:
    """What was measured before the block does not count in it; what is measured in it takes its
    place."""
    token = _measured_anew.set(set())
    try:
        yield
    finally:
        _measured_anew.reset(token)


def _key(
    layers: Sequence[nn.Module],
    batch: Batch,
    loss: LossFunction,
    threads: int,
    device: str,
    precision: Precision,
) -> str:
    def shape(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"

    circumstances = [
        str(METHOD),
        *_machine(threads, device),
        precision.value,
        _loss_name(loss),
        *(str(map_tensors(shape, part)) for part in batch),
        *(
            f"{layer}{_calls(layer)} {modes_of(layer)} "
            f"{[(name, shape(p), p.requires_grad) for name, p in layer.named_parameters()]}"
            for layer in layers
        ),
    ]
    return _hashed(circumstances)


def _machine(threads: int, device: str) -> list[str]:
    return [torch.__version__, platform.machine(), _cpu_name(), str(threads), device]


def _hashed(circumstances: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(circumstances).encode()).hexdigest()


def _loss_name(loss: LossFunction) -> str:
    named: Any = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def _calls(layer: nn.Module) -> str:
    """What a captured layer does that no submodule's name tells; not in which lines of the model."""
    if not isinstance(layer, GraphStage):
        return ""
    return "\n".join(line.partition("  # ")[0] for line in layer.code.splitlines())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _packed(costs: Sequence[LayerCost]) -> dict[str, list[float]]:
    return {
        field.name: [getattr(cost, field.name) for cost in costs] for field in fields(LayerCost)
    }


def _unpacked(stored: Any, layers: int) -> list[LayerCost] | None:
    """What was packed; None for anything else, such as the mere times of earlier versions."""
    names = [field.name for field in fields(LayerCost)]
    if not isinstance(stored, dict) or sorted(stored) != sorted(names):
        return None
    if not all(_are_numbers(column) and len(column) == layers for column in stored.values()):
        return None
    return [
        LayerCost(**dict(zip(stored, row, strict=True)))
        for row in zip(*stored.values(), strict=True)
    ]


def _are_numbers(column: Any) -> bool:
    return isinstance(column, list) and all(type(value) in (int, float) for value in column)


def _read() -> dict[str, Any]:
    file = cache_file()
    if file is None or not file.exists():
        return {}
    try:
        stored = json.loads(file.read_text())
        if not isinstance(stored, dict):
            raise ValueError(f"it holds a {type(stored).__name__}")
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s); layers are measured anew", file, error)
        return {}
    return stored


def _write(key: str, packed: dict[str, list[float]]) -> None:
    file = cache_file()
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**_read(), key: packed}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, file)
    except OSError as error:
        logger.warning(
            "what layers cost cannot be kept in %s (%s): the next run measures again and may cut "
            "elsewhere; give split=... to fix the cut, or FDG_CACHE_DIR for another folder",
            file,
            error,
        )
