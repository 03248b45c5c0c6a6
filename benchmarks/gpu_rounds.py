"""Trials take turns, round by round; what comes of it as medians, quartiles and ratios."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.device_clock import Deadline, DeviceClock
from benchmarks.gpu_trials import Span, Task, Trial
from benchmarks.harness import quartiles

logger = logging.getLogger(__name__)

NO_TIME = "no time left"
Make = Callable[[], Trial]


@dataclass(frozen=True)
class Ratio:
    """Device time of one case over that of another, at most ``goal``."""

    of: str
    to: str
    goal: float | None = None


@dataclass(frozen=True)
class Effort:
    """How much is measured: a span lasts about ``span_s`` seconds but has a number of steps in
    ``steps``; at most ``rounds``."""

    span_s: float
    steps: tuple[int, int]
    rounds: int

    def steps_of(self, step_s: float) -> int:
        least, most = self.steps
        return max(least, min(most, round(self.span_s / max(step_s, 1e-9))))


@dataclass
class Turn:
    """One case."""

    trial: Trial
    steps: int
    memory_mb: float
    spans: list[Span] = field(default_factory=list)

    def seconds(self) -> float:
        """What a round of it takes, about."""
        return (self.steps + 20) * max(span.wall_s for span in self.spans)


def take_turns(
    makers: Mapping[str, Make],
    ratios: Sequence[Ratio],
    effort: Effort,
    deadline: Deadline,
    task: Task,
) -> dict[str, Any]:
    """Make all trials, then let them take turns until ``effort`` or ``deadline`` is reached.

    A case that raises is left out, with its traceback in ``errors``.
    """
    turns: dict[str, Turn] = {}
    errors: dict[str, str] = {}
    rounds: list[dict[str, Span]] = []
    try:
        for name, make in makers.items():
            if deadline.left <= 0:
                errors[name] = NO_TIME
                continue
            try:
                turns[name] = made_ready(make, effort, task)
            except Exception:
                errors[name] = traceback.format_exc(limit=-12)
                logger.warning("%s: %s", name, errors[name].splitlines()[-1])
        while turns and len(rounds) < effort.rounds and room_for(rounds, turns, deadline):
            rounds.append(one_round(turns, errors))
        return {
            "rounds": len(rounds),
            "cases": {
                name: case(turn, name, rounds, task.batch_size) for name, turn in turns.items()
            },
            "ratios": ratios_of(rounds, ratios),
            "errors": errors,
        }
    finally:
        for turn in turns.values():
            turn.trial.close()


def room_for(rounds: Sequence[Any], turns: Mapping[str, Turn], deadline: Deadline) -> bool:
    """There is one round at least."""
    return not rounds or deadline.left > sum(turn.seconds() for turn in turns.values())


def made_ready(make: Make, effort: Effort, task: Task) -> Turn:
    """A trial behind two spans: one in which everything is made for the first time, one that shows
    how much memory it takes and how long a step is."""
    clock = DeviceClock(task.device)
    clock.forget()
    before = clock.reserved_bytes()
    trial = make()
    try:
        least = effort.steps[0]
        trial.span(least)
        clock.forget()
        span = trial.span(least)
        memory = clock.reserved_bytes(peak=True) - before
        return Turn(trial, effort.steps_of(span.step_s), memory / 1e6, [span])
    except BaseException:
        trial.close()
        raise


def one_round(turns: dict[str, Turn], errors: dict[str, str]) -> dict[str, Span]:
    spans = {}
    for name, turn in list(turns.items()):
        try:
            spans[name] = turn.trial.span(turn.steps)
            turn.spans.append(spans[name])
        except Exception:
            errors[name] = traceback.format_exc(limit=-12)
            turns.pop(name).trial.close()
    return spans


def case(
    turn: Turn, name: str, rounds: Sequence[Mapping[str, Span]], batch_size: int
) -> dict[str, Any]:
    spans = [spans[name] for spans in rounds if name in spans]
    return {
        "ms_per_step": quartiles([1e3 * span.step_s for span in spans]),
        "wall_ms_per_step": quartiles([1e3 * span.wall_s for span in spans]),
        "samples_per_s": quartiles([batch_size / span.step_s for span in spans]),
        "steps": turn.steps,
        "memory_mb": turn.memory_mb,
        **turn.trial.notes(),
    }


def ratios_of(
    rounds: Sequence[Mapping[str, Span]], ratios: Sequence[Ratio]
) -> list[dict[str, Any]]:
    """Of those whose both cases were measured; within a round each."""
    found = []
    for ratio in ratios:
        pairs = [(r[ratio.of], r[ratio.to]) for r in rounds if ratio.of in r and ratio.to in r]
        if not pairs:
            continue
        found.append(
            {
                "of": ratio.of,
                "to": ratio.to,
                "goal": ratio.goal,
                **quartiles([one.step_s / other.step_s for one, other in pairs]),
                "wall": quartiles([one.wall_s / other.wall_s for one, other in pairs]),
            }
        )
    return found
