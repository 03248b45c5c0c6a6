"""Where the time of training goes: stages at work, and waiting for data. No torch."""

from __future__ import annotations

from dataclasses import dataclass

STAGES_SHOWN = 4  # up to so many stages each share is shown, of more the lowest and the highest
DATA_WAIT_SHOWN = 0.01


@dataclass(frozen=True)
class Shares:
    """Shares of training time, each in [0, 1].

    Attributes:
        busy: per stage, of the time in which one of its actions was at work, waiting for Python's
            lock included; None where it is not measured (CUDA devices).
        data_wait: of the time in which the loader was waited for until no stage had anything left
            to do.
    """

    busy: tuple[float, ...] | None
    data_wait: float = 0.0

    def __str__(self) -> str:
        """Such as ``busy 97 84 %  data 3 %``; the data is left out where it takes next to nothing."""
        text = f"busy {_percent(self.busy)}"
        if self.data_wait > DATA_WAIT_SHOWN:
            text += f"  data {100 * self.data_wait:.0f} %"
        return text


def _percent(busy: tuple[float, ...] | None) -> str:
    if busy is None:
        return "-"
    shown = [f"{100 * share:.0f}" for share in busy]
    if len(shown) > STAGES_SHOWN:
        shown = [f"{100 * min(busy):.0f} to {100 * max(busy):.0f}"]
    return f"{' '.join(shown)} %"


@dataclass(frozen=True)
class Spent:
    """Seconds of training time.

    Attributes:
        seconds: in all.
        data: of waiting for the loader.
        busy: of each stage at work; None: not measured, of all or of a part; empty: no time yet.
    """

    seconds: float = 0.0
    data: float = 0.0
    busy: tuple[float, ...] | None = ()

    def __add__(self, other: Spent) -> Spent:
        busy = None
        if self.busy is not None and other.busy is not None:
            both = zip(self.busy, other.busy, strict=True)
            busy = (
                tuple(a + b for a, b in both)
                if self.busy and other.busy
                else self.busy or other.busy
            )
        return Spent(self.seconds + other.seconds, self.data + other.data, busy)

    def shares(self) -> Shares | None:
        """None where there was no time."""
        if not self.seconds > 0:
            return None
        busy = None
        if self.busy:
            # Two clocks, read one after the other, may make a share of 1 a little more.
            busy = tuple(min(1.0, seconds / self.seconds) for seconds in self.busy)
        return Shares(busy, self.data / self.seconds)
