"""Checks of arguments that several modules share. No torch."""

from __future__ import annotations


def whole(name: str, value: int, least: int, of: str) -> int:
    """``value``, which must be a whole number of ``of``, at least ``least``.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of {of}, {least} or more; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more {of}; got {value}")
    return value
