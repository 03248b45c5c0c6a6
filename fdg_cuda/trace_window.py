"""Which ticks a trace records, as text. No torch."""

from __future__ import annotations

import re


def read_window(text: str) -> tuple[int, int]:
    """``100:150``, ticks 100 to 149 counted from 0 over all epochs, as the ``(skip, ticks)`` of
    :meth:`~fdg_cuda.FDGRunner.trace`: ``(100, 50)``.

    Raises:
        ValueError: it is no such window, or an empty one.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text, flags=re.ASCII)
    if found is None:
        raise ValueError(
            f"a window of ticks is two whole numbers, such as 100:150 for ticks 100 to 149; got "
            f"{text!r}"
        )
    first, behind = int(found[1]), int(found[2])
    if behind <= first:
        raise ValueError(
            f"a window of ticks ends behind its begin, such as {first}:{first + 50} for "
            f"{first} to {first + 49}; got {text!r}, in which there is no tick"
        )
    return first, behind - first
