"""What a mistyped name may have meant. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` resembles most, whatever the case; None if none does."""
    by_lower = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'digits'?``, to be put behind a sentence; empty if nothing is near."""
    near = nearest(name, known)
    return f" Did you mean {near!r}?" if near else ""
