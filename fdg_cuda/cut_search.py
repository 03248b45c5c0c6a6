"""Dynamic programmes over all cuts of a chain.

A stage of layers i..j-1 takes

    time(i, j)   = max(seconds of its forwards, backwards and update, seconds its send stream is busy)
    memory(i, j) = end(j) - begin(i)

where all sums over layers are differences of sums from the chain's beginning. Stage by stage,
``best[j]`` is the smallest longest time with which the stages so far can hold layers 0..j-1:

    best'[j] = min over i of max(best[i], time(i, j))    where memory(i, j) fits

The round trip between the last two stages is a matter of the last but one: where that ends, the last one
begins.

K stages and n layers take K n^2 / 2 steps, as numpy operations on blocks, and fewer since stages that
would take longer than the best cut are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdg_cuda.costs import LayerCost
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.stage_memory import Holding

Array = NDArray[np.float64]
BLOCK = 128  # stage ends looked at together
CLOSE = 1e-9  # relative; times closer than that are one
SHORTAGE_STEPS = 16  # halvings of the interval in which the smallest shortage of memory is searched


@dataclass(frozen=True)
class Run:
    """Neighbouring stages on one device."""

    stages: range
    device: str
    limit: float  # bytes they may use together

    @property
    def title(self) -> str:
        first, last = self.stages[0], self.stages[-1]
        return f"stage {first}" if first == last else f"stages {first} to {last} together"


# (stage, ends, begins, best so far) -> what a cut with a stage from a begin (column) to an end (row)
# comes to; infinite if it is not allowed.
Value = Callable[[int, slice, slice, Array], Array]


class Search:
    """The arrays of one problem, and the dynamic programmes over them.

    Attributes (all lists per stage, the arrays with n + 1 entries, by layer):
        seconds: up to the layer.
        up, down: seconds of the send stream, if the stage ends, or begins, before the layer.
        end, begin: bytes; see the module's.
    """

    def __init__(
        self,
        costs: Sequence[LayerCost],
        holdings: Sequence[Holding],
        devices: Sequence[DeviceSpec],
        links: Sequence[Link],
        allowed: Collection[int],
        *,
        update_seconds_per_byte: float,
        round_trip: bool,
    ) -> None:
        self._n, self._stages = len(costs), len(holdings)
        self._forbidden = np.array([cut not in allowed for cut in range(self._n + 1)])
        self._runs = _runs(devices)
        self._run_of = [run for run in self._runs for _ in run.stages]
        columns = SimpleNamespace(
            **{
                field.name: np.array([getattr(cost, field.name) for cost in costs], np.float64)
                for field in fields(LayerCost)
            }
        )
        above = SimpleNamespace(error_bytes=np.append(columns.error_bytes[1:], 0.0))
        none = np.zeros(self._n)
        self.seconds: list[Array] = []
        self.up: list[Array] = []
        self.down: list[Array] = []
        self.end: list[Array] = []
        self.begin: list[Array] = []
        behind_backward: list[Array] = []
        for k, (device, holding) in enumerate(zip(devices, holdings, strict=True)):
            computing = holding.forwards * columns.forward + columns.backward
            update = columns.parameter_bytes * update_seconds_per_byte
            self.seconds.append(_summed(computing + update) / device.speed)
            behind_backward.append(_summed(columns.forward + update) / device.speed)
            up = none if holding.is_last else links[k].seconds(columns.output_bytes)
            down = none if holding.is_first else links[k - 1].seconds(columns.error_bytes)
            self.up.append(np.append(0.0, up))
            self.down.append(np.append(down, 0.0))
            held = _summed(_total(holding.of_layer(columns)))
            last = _total(holding.of_last(columns, above)) + none
            first = _total(holding.of_first(columns)) + none
            self.end.append(held + np.append(0.0, last))
            self.begin.append(held - np.append(first, 0.0))
        # Of the last stage's forward and backward, and the hops there and back, by where it begins.
        self._beyond: Array | None = None
        if round_trip and self._stages > 1 and (self.up[-2].any() or self.down[-1].any()):
            last_stage = _summed(computing) / devices[-1].speed
            self._beyond = last_stage[-1] - last_stage + self.up[-2] + self.down[-1]
            self._behind_backward = behind_backward[-2]

    # -- what is asked for ------------------------------------------------------------------------

    def best(self) -> list[int] | None:
        """The split whose longest time is shortest; None if none fits."""
        split = self._shortest()
        if split is None or self._fits(split):
            return split
        # Each stage fits, but not together with those it shares a device with.
        found = self.least_memory()
        if found is None:
            return None
        low, high = self._longest(split), self._longest(found)
        while high - low > CLOSE * high:
            middle = (low + high) / 2
            other = self.least_memory(middle)
            if other is None:
                low = middle
            else:
                found, high = other, self._longest(other)
        return found

    def least_memory(self, longest: float = math.inf, more: float = 0.0) -> list[int] | None:
        """A split that fits, whose stages take no longer than ``longest``; None if there is none.

        Args:
            more: bytes by which limits may be surpassed.
        """

        def value(k: int, ends: slice, begins: slice, best: Array) -> Array:
            run = self._run_of[k]
            before = best[begins]
            if k == run.stages[0]:
                before = np.where(np.isfinite(before), 0.0, math.inf)
            needed = self._memory(k, ends, begins) + before
            allowed = needed <= run.limit + more
            if math.isfinite(longest):
                allowed &= self._time(k, ends, begins) <= longest
            needed[~allowed] = math.inf
            return needed

        return self._sweep(value, longest)

    def least_short(self) -> list[int]:
        """The split that lacks least memory, where none fits (to some bytes)."""
        found = self.least_memory(more=math.inf)
        assert found is not None
        low, high = 0.0, self.shortage(found)[0]
        for _ in range(SHORTAGE_STEPS):
            if high - low < 1:
                break
            middle = (low + high) / 2
            other = self.least_memory(more=middle)
            if other is None:
                low = middle
            else:
                found, high = other, self.shortage(other)[0]
        return found

    # -- of a whole split -------------------------------------------------------------------------

    def stage_seconds(self, split: list[int]) -> list[float]:
        """Each stage's, of its forwards, backward and update."""
        return [
            float(s[j] - s[i]) for s, (i, j) in zip(self.seconds, self.bounds(split), strict=True)
        ]

    def send_seconds(self, split: list[int]) -> list[float]:
        """Each stage's, of its send stream."""
        bounds = zip(self.up, self.down, self.bounds(split), strict=True)
        return [float(up[j] + down[i]) for up, down, (i, j) in bounds]

    def round_trip_seconds(self, split: list[int]) -> float:
        """Half of a batch's way to the last stage and back, the work of the one before included."""
        if self._beyond is None:
            return 0.0
        begin, end = self.bounds(split)[-2]
        return float(self._round_trip(slice(end, end + 1), slice(begin, begin + 1)).item())

    def shortage(self, split: list[int]) -> tuple[float, Run]:
        """The largest there is: bytes, negative if there are as many left, and where."""
        bounds = zip(self.end, self.begin, self.bounds(split), strict=True)
        needed = [float(end[j] - begin[i]) for end, begin, (i, j) in bounds]
        lacking = [(sum(needed[k] for k in run.stages) - run.limit, run) for run in self._runs]
        return max(lacking, key=lambda item: item[0])

    def bounds(self, split: list[int]) -> list[tuple[int, int]]:
        """Where each stage begins and ends."""
        return list(pairwise([0, *split, self._n]))

    def _longest(self, split: list[int]) -> float:
        return max(
            *self.stage_seconds(split), *self.send_seconds(split), self.round_trip_seconds(split)
        )

    def _fits(self, split: list[int]) -> bool:
        return self.shortage(split)[0] <= 0

    # -- dynamic programmes -----------------------------------------------------------------------

    def _shortest(self) -> list[int] | None:
        """As :meth:`best`, as if every stage had its device to itself."""

        def value(k: int, ends: slice, begins: slice, best: Array) -> Array:
            time = np.maximum(self._time(k, ends, begins), best[begins])
            time[self._memory(k, ends, begins) > self._run_of[k].limit] = math.inf
            return time

        # Most stages are far too long: with a guess of the longest they are not looked at, and what
        # is found is the best if it is within the guess.
        ideal = 1 / sum(1 / max(seconds[-1], 1e-300) for seconds in self.seconds)
        for guess in (1.25 * ideal, 2 * ideal, 4 * ideal):
            split = self._sweep(value, guess)
            if split is not None and self._longest(split) <= guess:
                return split
        return self._sweep(value, math.inf)

    def _sweep(self, value: Value, longest: float) -> list[int] | None:
        """The split with the smallest value, which is combined from stage to stage; None if all are
        infinite. Stages that take longer than ``longest`` need not be looked at."""
        n, last = self._n, self._stages - 1
        best = np.full(n + 1, math.inf)
        best[0] = 0.0
        choices: list[NDArray[np.intp]] = []
        for k in range(self._stages):
            following = np.full(n + 1, math.inf)
            choice = np.zeros(n + 1, np.intp)
            for ends in _blocks(k + 1 if k < last else n, n - (last - k) + 1):
                begins = slice(self._first_begin(k, ends.start, longest), ends.stop - 1)
                if begins.start >= begins.stop:
                    continue
                values = value(k, ends, begins, best)
                # A stage has at least one layer.
                late = max(ends.start - begins.start, 0)
                rows, columns = (
                    np.arange(ends.start, ends.stop),
                    np.arange(begins.start, begins.stop),
                )
                values[:, late:][columns[late:] >= rows[:, None]] = math.inf
                at = values.argmin(axis=1)
                following[ends] = values[np.arange(len(rows)), at]
                choice[ends] = at + begins.start
            if k < last:
                following[self._forbidden] = math.inf
            best = following
            choices.append(choice)
        if not math.isfinite(best[n]):
            return None
        split, end = [], n
        for choice in reversed(choices[1:]):
            end = int(choice[end])
            split.append(end)
        return split[::-1]

    def _first_begin(self, k: int, end: int, longest: float) -> int:
        """The first begin of a stage that ends no earlier than ``end``."""
        if not math.isfinite(longest):
            return k
        # One more: rounding.
        begin = np.searchsorted(self.seconds[k], self.seconds[k][end] - longest) - 1
        return max(int(begin), k)

    def _time(self, k: int, ends: slice, begins: slice) -> Array:
        time: Array = self.seconds[k][ends, None] - self.seconds[k][begins]
        if self.up[k].any() or self.down[k].any():
            time = np.maximum(time, self.up[k][ends, None] + self.down[k][begins])
        if self._beyond is not None and k == self._stages - 2:
            time = np.maximum(time, self._round_trip(ends, begins))
        return time

    def _round_trip(self, ends: slice, begins: slice) -> Array:
        """Half of it, for the last stage but one."""
        assert self._beyond is not None
        k = self._stages - 2
        working = self.seconds[k][ends, None] - self.seconds[k][begins]
        # The way up waits until the error signals, made before the update and the forward, went down.
        behind = self._behind_backward[ends, None] - self._behind_backward[begins]
        waiting = np.maximum(self.down[k][begins] - behind, 0.0)
        half: Array = (working + waiting + self._beyond[ends, None]) / 2
        return half

    def _memory(self, k: int, ends: slice, begins: slice) -> Array:
        needed: Array = self.end[k][ends, None] - self.begin[k][begins]
        return needed


def _runs(devices: Sequence[DeviceSpec]) -> list[Run]:
    runs: list[Run] = []
    names = [device.name for device in devices]
    stage = 0
    for name, group in groupby(devices, lambda device: device.name):
        run = list(group)
        limits = {device.memory_bytes for device in devices if device.name == name}
        if len(limits) > 1:
            raise ValueError(
                f"{name} is given with different memories, {sorted(limits, key=str)}; stages on "
                f"devices of one name share one memory. Give different devices different names."
            )
        limit = run[0].memory_bytes
        share = math.inf if limit is None else limit * len(run) / names.count(name)
        runs.append(Run(range(stage, stage + len(run)), name, share))
        stage += len(run)
    return runs


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, BLOCK):
        yield slice(first, min(first + BLOCK, stop))


def _summed(values: Array) -> Array:
    """Sums of the first 0, 1, ... values."""
    return np.append(0.0, np.cumsum(values))


def _total(parts: dict[str, Any]) -> Any:
    return sum(parts.values())
