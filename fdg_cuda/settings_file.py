"""Settings from a TOML, YAML or JSON file, or one message with everything wrong in it. No torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fdg_cuda.names import did_you_mean
from fdg_cuda.options import Option

# What a run's settings.json has at its top; its "settings" are the run's.
RECORD = {"command", "settings", "versions"}

# YAML 1.2's core schema: what a scalar looks like, and how it may begin.
YAML_SCALARS = {
    "tag:yaml.org,2002:bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


def read_values(path: str | os.PathLike[str], table: Mapping[str, Option]) -> dict[str, Any]:
    """The settings of ``table`` that a file gives, by field name, checked and in their own types.

    The file holds them at its top, or is the settings.json that a run left in its folder.

    Raises:
        ValueError: another kind of file, one that is damaged, or entries that are no settings or
            have wrong values: one message names all of them.
        OSError: the file cannot be read.
    """
    path = Path(path)
    entries = parse_file(path)
    if entries.keys() >= RECORD and isinstance(entries["settings"], dict):
        entries = entries["settings"]
    values: dict[str, Any] = {}
    mistakes = []
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in table:
            known = [entry.replace("_", "-") if "-" in str(key) else entry for entry in table]
            mistakes.append(f"{key!r} is no setting.{did_you_mean(str(key), known)}")
        elif name in values:
            mistakes.append(f"{key!r} is there twice, with - and with _.")
        else:
            try:
                values[name] = table[name].accept(value)
            except ValueError as error:
                values[name] = None
                mistakes.append(f"{key!r} {error}.")
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ValueError(f"{path} has {count}: {' '.join(mistakes)}")
    return values


def parse_file(path: Path) -> dict[Any, Any]:
    """The entries of a TOML, YAML or JSON file, as it gives them.

    Raises:
        ValueError: another kind of file, one that is damaged, or that holds no names with values.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() not in PARSERS:
        raise ValueError(f"a file of settings is told by its end, {', '.join(PARSERS)}; got {path}")
    content = path.read_bytes()
    try:
        entries = PARSERS[path.suffix.lower()](content.decode("utf-8-sig"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be understood: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"{path} must hold names of settings with their values; got {type(entries).__name__}"
        )
    return entries


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _yaml(text: str) -> Any:
    import yaml

    try:
        entries = yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if entries is None else entries  # nothing but comments


def _yaml_loader() -> Any:
    """pyyaml's safe loader with the numbers and truth values of YAML 1.2.

    By itself it follows YAML 1.1, in which ``graphs: on`` is a truth value and ``lr: 1e-3`` is text.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # it has no types
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as the base class has them)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept = [(tag, pattern) for tag, pattern in resolvers if tag not in YAML_SCALARS]
        Loader.yaml_implicit_resolvers[first] = kept
    for tag, (pattern, first) in YAML_SCALARS.items():
        Loader.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), first)
    return Loader


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Pairs as a dictionary; JSON and YAML would quietly take the last of several."""
    table: dict[Any, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{key!r} is there twice")
        table[key] = value
    return table


PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": _toml,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": _json,
}
