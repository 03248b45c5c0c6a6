"""What a study of learning says about the claims of the FDG paper.

Each answer rests on one number per seed, taken between runs with the same first weights and batches,
and on the 95 % interval of Student's t around the mean over seeds. An interval above 0 or below it
is an answer, however small; one with 0 inside is "within noise", and its width says what would not have
been seen. So equality is claimed only of one that lies within ``MARGIN``, and that shrinking recovers
too little where all of its interval does. A run that diverged counts as guessing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.learning_runs import BP, Runs, Way, key_of

# Two-sided 95 % quantiles for 1, 2, ... degrees of freedom; for more the last one, a little careful.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


MARGIN = 0.005  # of the test error: what is called equal is known to differ by less


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds, and how far on both sides its 95 % interval reaches."""

    mean: float
    half: float
    n: int

    @property
    def above(self) -> bool:
        return self.mean > self.half

    @property
    def below(self) -> bool:
        return self.mean < -self.half

    @property
    def around_nothing(self) -> bool:
        """Whether all of it is within ``MARGIN`` of 0."""
        return abs(self.mean) + self.half <= MARGIN

    def __str__(self) -> str:
        """In percentage points."""
        mean = f"{100 * self.mean:+.2f}"
        if self.n == 1:
            return f"{mean} points (one seed: noise unknown)"
        return f"{mean} ± {100 * self.half:.2f} points"


@dataclass(frozen=True)
class Verdict:
    claim: str
    answer: str
    because: str


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of one value per seed."""
    n = len(values)
    if n == 1:
        return Interval(values[0], math.inf, 1)
    half = T_95[min(n - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half, n)


def slope(stages: Sequence[int], errors: Sequence[float]) -> float:
    """Of the least-squares line through the errors over the numbers of stages."""
    middle = statistics.fmean(stages)
    over = sum((k - middle) * error for k, error in zip(stages, errors, strict=True))
    return over / sum((k - middle) ** 2 for k in stages)


class Errors:
    """Final test errors of paired runs; a diverged one guesses among ``classes``."""

    def __init__(self, runs: Runs, classes: int) -> None:
        guessing = 1 - 1 / classes
        self._errors = {
            key: guessing if run["diverged"] else run["epochs"][-1]["test_error"]
            for key, run in runs.items()
        }
        self._seeds = sorted({run["seed"] for run in runs.values()})

    def of(self, ways: Sequence[Way]) -> list[list[float]]:
        """The errors of ``ways``, for each seed with which all of them were run."""
        keys = [[key_of(way, seed) for way in ways] for seed in self._seeds]
        return [
            [self._errors[key] for key in row]
            for row in keys
            if all(k in self._errors for k in row)
        ]


def verdicts(runs: Runs, ways: Iterable[Way], classes: int) -> list[Verdict]:
    """On the claims that ``runs`` can say something about."""
    errors = Errors(runs, classes)
    fdg = [way for way in ways if way.method == "fdg"]
    plain = [way for way in fdg if way.beta == 1]
    shrunk = [way for way in fdg if way.beta != 1]
    found = [_grows(errors, plain), _recovers(errors, plain, shrunk)]
    found += [_equals(errors, way) for way in fdg if way.stages == 2]
    return [verdict for verdict in found if verdict is not None]


def _grows(errors: Errors, plain: list[Way]) -> Verdict | None:
    ways = [BP, *plain]
    stages = [way.stages for way in ways]
    slopes = [slope(stages, row) for row in errors.of(ways)]
    if not slopes:
        return None
    trend = interval(slopes)
    return Verdict(
        "error grows with K at beta = 1",
        _answer(trend, "yes", "no: it falls"),
        f"fdg: {trend} per stage (a line through K = {stages[0]}, which is bp, to {stages[-1]})",
    )


def _recovers(errors: Errors, plain: list[Way], shrunk: list[Way]) -> Verdict | None:
    rows = errors.of([BP, *plain, *shrunk])
    if not rows:
        return None
    count = len(plain)
    bp = [row[0] for row in rows]
    before = [statistics.fmean(row[1 : count + 1]) for row in rows]
    after = [statistics.fmean(row[count + 1 :]) for row in rows]
    gain = interval([a - b for a, b in zip(before, after, strict=True)])
    left = interval([a - b for a, b in zip(after, bp, strict=True)])
    # What is left may be lost in noise: then at least half of the damage has to be gone.
    damage = statistics.fmean(before) - statistics.fmean(bp)
    half_left = left.mean > damage / 2
    partly = left.above or half_left
    answer = _answer(gain, "partly" if partly else "yes", "no: it does harm")
    # What is gained beyond half of what is lost.
    beyond = interval([a - b - (a - c) / 2 for a, b, c in zip(before, after, bp, strict=True)])
    if beyond.below and not gain.below:
        answer = f"{'partly' if gain.above else 'no'}: less than half of it"
    beta = shrunk[0].beta
    return Verdict(
        f"shrinking (beta = {beta:g}) recovers it",
        answer,
        f"fdg, mean over K: {gain} less error than with beta = 1, which leaves {left} to bp",
    )


def _equals(errors: Errors, way: Way) -> Verdict | None:
    rows = errors.of([BP, way])
    if not rows:
        return None
    above = interval([error - bp for bp, error in rows])
    if above.n == 1:
        answer = UNDECIDED
    elif above.above or above.below:
        answer = "no: worse" if above.above else "no: better"
        if above.around_nothing:
            answer += f", by less than {100 * MARGIN:g} points"
    elif above.around_nothing:
        answer = "yes"
    else:
        answer = f"within noise, which is wider than {100 * MARGIN:g} points"
    return Verdict(
        f"fdg equals bp within noise at K = {way.stages}, beta = {way.beta:g}",
        answer,
        f"{above} to bp",
    )


UNDECIDED = "undecided: one seed"


def _answer(interval: Interval, above: str, below: str) -> str:
    if interval.n == 1:
        return UNDECIDED
    if interval.above or interval.below:
        return above if interval.above else below
    return "within noise"
