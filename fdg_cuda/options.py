"""Options as data: a dataclass field that says how its values are read, checked, shown and written.

The command line, settings files and the checks of values are all made from these. No torch.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

LONGEST_SHOWN = 60  # characters of a wrong value that a message repeats


@dataclass(frozen=True)
class Kind:
    """Values of one type.

    Attributes:
        takes: what is expected, for messages.
        python: what the command line's reader makes of a word; ``str``: ``accept`` reads the text.
        accept: the value meant by what a command line or a file gave; raises ValueError,
            TypeError or OverflowError.
        write: the value as a word of a command line, which ``accept`` reads.
    """

    takes: str
    python: type
    accept: Callable[[Any], Any]
    write: Callable[[Any], str] = str


@dataclass(frozen=True)
class Option:
    """One setting, as a field made by :func:`option` describes it.

    Attributes:
        name: of the field; files may have ``-`` for ``_``.
        kind: from the field's annotation.
        optional: whether None is a value: a default that depends on other things.
        default: the field's.
        help: one sentence.
        panel: the heading under which the help stands.
        shown: the default in words where the value does not tell it.
        takes: what is expected, for messages.
        auto: the word that stands for None.
        least: the smallest value.
        allowed: whether a value of the right type is one of those that can be.
    """

    name: str
    kind: Kind
    optional: bool
    default: Any
    help: str
    panel: str
    shown: str | None
    takes: str
    auto: str | None
    least: float | None
    allowed: Callable[[Any], bool] | None

    @property
    def flag(self) -> str:
        """``--batch-size``."""
        return f"--{self.name.replace('_', '-')}"

    def accept(self, value: Any) -> Any:
        """The value of the setting that a command line's word or a file's entry means.

        Raises:
            ValueError: none; the message (without the name) says what was expected and what came.
        """
        if (value is None and self.optional) or (self.auto is not None and value == self.auto):
            return None
        try:
            accepted = self.kind.accept(value)
        except (TypeError, ValueError, OverflowError):
            raise self._refused(value) from None
        if self.least is not None and not accepted >= self.least:  # NaN is not
            raise self._refused(value)
        if self.allowed is not None and not self.allowed(accepted):
            raise self._refused(value)
        return accepted

    def words(self, value: Any) -> list[str]:
        """The words of a command line that give ``value``; none where there is nothing to say."""
        if value is None or (value is False and not self.default and not self.optional):
            return []
        if isinstance(value, bool):
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        return [self.flag, self.kind.write(value)]

    def _refused(self, value: Any) -> ValueError:
        got = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
        if len(got) > LONGEST_SHOWN:
            got = f"{got[:LONGEST_SHOWN]}..."
        return ValueError(f"takes {self.takes}; got {got}")


def option(
    default: Any,
    panel: str,
    help: str,
    *,
    shown: str | None = None,
    takes: str | None = None,
    auto: str | None = None,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    allowed: Callable[[Any], bool] | None = None,
) -> Any:
    """A dataclass field that is a setting; its annotation says which :class:`Kind` it is of.

    Args:
        default, panel, help, shown, takes, auto, least, allowed: see :class:`Option`; ``takes`` is
            by default what the kind and ``least`` say.
        choices: the only values.
    """
    if choices is not None:
        takes, allowed = f"one of {', '.join(choices)}", choices.__contains__
    return field(
        default=default,
        metadata={
            "help": help,
            "panel": panel,
            "shown": shown,
            "takes": takes,
            "auto": auto,
            "least": least,
            "allowed": allowed,
        },
    )


def options_of(settings: type) -> dict[str, Option]:
    """The options of a dataclass whose fields :func:`option` made, by name and in order."""
    hints = get_type_hints(settings)
    table = {}
    for entry in fields(settings):
        described = dict(entry.metadata)
        kind, optional = _kind_of(hints[entry.name])
        least = described["least"]
        bound = "" if least is None else f" of at least {least}"
        described["takes"] = described["takes"] or kind.takes + bound
        table[entry.name] = Option(entry.name, kind, optional, entry.default, **described)
    return table


def _kind_of(annotation: Any) -> tuple[Kind, bool]:
    """The kind of ``T`` or ``T | None``, and whether it was the latter."""
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (entry for entry in get_args(annotation) if entry is not type(None))
        annotation, optional = inner, True
    return KINDS[annotation], optional


# -- the kinds ------------------------------------------------------------------------------------


def _instance(wanted: type) -> Callable[[Any], Any]:
    def accept(value: Any) -> Any:
        # Python's True is an int, but nobody means 1 by it.
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise TypeError
        return value

    return accept


_integer = _instance(int)


def _number(value: Any) -> float:
    return value if isinstance(value, float) else float(_integer(value))


def _entries(value: Any) -> list[Any]:
    """Of a list, of text with commas, or the only one."""
    if isinstance(value, str):
        return [entry.strip() for entry in value.split(",")] if value.strip() else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(int(e) if isinstance(e, str) else _integer(e) for e in _entries(value))


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(_instance(str)(entry) for entry in _entries(value))
    if not all(texts) or not texts:
        raise ValueError
    return texts


def _devices(value: Any) -> tuple[int | str, ...]:
    def device(entry: Any) -> int | str:
        if not isinstance(entry, str):
            return int(_integer(entry))
        if not entry:
            raise ValueError
        return int(entry) if re.fullmatch(r"[0-9]+", entry) else entry

    devices = tuple(device(entry) for entry in _entries(value))
    if not devices:
        raise ValueError
    return devices


def _table(value: Any) -> dict[str, Any]:
    table = json.loads(value) if isinstance(value, str) else value
    # What JSON would change (a date, a key that is a number) could not be recorded and repeated.
    if not isinstance(table, dict) or json.loads(json.dumps(table)) != table:
        raise TypeError
    return table


def _joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


KINDS: dict[Any, Kind] = {
    str: Kind("text", str, _instance(str)),
    int: Kind("a whole number", int, _integer),
    float: Kind("a number", float, _number),
    bool: Kind("true or false", bool, _instance(bool)),
    tuple[int, ...]: Kind("whole numbers such as 3,7", str, _integers, _joined),
    tuple[str, ...]: Kind("names separated by commas", str, _texts, _joined),
    tuple[int | str, ...]: Kind("devices such as cpu,cpu or 0,1", str, _devices, _joined),
    dict[str, Any]: Kind("a JSON object", str, _table, json.dumps),
}
