"""State dictionaries as plain JSON values and back, so that no checkpoint needs pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

TAG = "__fdg_cuda__"  # of the dictionaries that stand for what JSON has no word for


def to_plain(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """``value`` as numbers, strings, booleans, None, lists and dictionaries with string keys.

    Tuples, counters, and dictionaries with numbers as keys are kept apart from lists and plain
    dictionaries; numbers of numpy become plain ones. Tensors are copied into ``tensors`` under names
    made here; without it those with one element become numbers.

    Raises:
        TypeError: something else, named with its place: ``where`` and the keys below.
    """
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float):
        if isinstance(value, plain):  # some that are derived from it are not, Default say
            return plain(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Tensor) and tensors is not None:
        name = str(len(tensors))
        tensors[name] = value.detach().clone()
        return {TAG: "tensor", "name": name}
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return to_plain(value.item(), where)
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {TAG: "tuple", "items": items}
    if isinstance(value, dict):
        if type(value) is dict and all(isinstance(key, str) for key in value) and TAG not in value:
            return {k: to_plain(item, f"{where}[{k!r}]", tensors) for k, item in value.items()}
        if isinstance(value, (Counter, dict)):
            kind = "counter" if isinstance(value, Counter) else "dict"
            pairs = [
                [to_plain(key, f"a key of {where}"), to_plain(item, f"{where}[{key!r}]", tensors)]
                for key, item in value.items()
            ]
            return {TAG: kind, "items": pairs}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold (it is written without "
        f"pickle): numbers, strings, booleans, None, and lists, tuples and dictionaries of them can"
    )


def from_plain(value: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """What :func:`to_plain` was given; of ``tensors``, copies."""
    if isinstance(value, list):
        return [from_plain(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(TAG)
    if kind is None:
        return {key: from_plain(item, tensors) for key, item in value.items()}
    if kind == "tensor":
        return (tensors or {})[value["name"]].clone()
    items = [from_plain(item, tensors) for item in value["items"]]
    if kind == "tuple":
        return tuple(items)
    pairs = {_hashable(key): item for key, item in items}
    return Counter(pairs) if kind == "counter" else pairs


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
