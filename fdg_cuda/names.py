"""Names that were given: whether they are known, and what a mistyped one may have meant. No torch."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` resembles most, whatever the case; None if none does."""
    by_lower = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    return by_lower[near[0]] if near else None


def counted(number: int, thing: str, several: str = "") -> str:
    """``1 stage``, ``2 stages``."""
    return f"{number} {thing if number == 1 else several or f'{thing}s'}"


def first_of(names: Sequence[str], most: int = 8) -> str:
    """So many of them, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'digits'?``, to be put behind a sentence; empty if nothing is near."""
    near = nearest(name, known)
    return f" Did you mean {near!r}?" if near else ""


def check_keywords(
    option: str, function: Callable[..., Any], given: Iterable[str], filled: Iterable[str]
) -> None:
    """Whether ``function`` can be called with the arguments named in ``given``, of the command
    line's ``option``; those in ``filled`` it gets from elsewhere.

    Raises:
        ValueError: it takes no such argument, or needs another one.
    """
    names, parameters = list(given), dict(inspect.signature(function).parameters)
    for name in filled:
        parameters.pop(name, None)
    takes = f"it takes {', '.join(parameters)}"
    for name in names:
        if name not in parameters:
            hint = did_you_mean(name, parameters)
            raise ValueError(f"{option}: {function.__name__} has no {name!r}; {takes}.{hint}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in names:
            raise ValueError(f"{option}: {function.__name__} needs {name!r}; {takes}")
