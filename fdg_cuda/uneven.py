"""What is said where stages take unlike times."""

from __future__ import annotations

from collections.abc import Sequence

CUTS_INSIDE = "capture=True (--capture) cuts inside the children, too"


def longest_in_means(seconds: Sequence[float]) -> float:
    """The longest stage's time in times the mean; 1 where all take none."""
    mean = sum(seconds) / len(seconds)
    return max(seconds) / mean if mean else 1.0


def said_of_uneven(seconds: Sequence[float]) -> str:
    """For people; of stages by their seconds per batch."""
    return f"the longest of {len(seconds)} stages takes {longest_in_means(seconds):.2f} times their mean"
