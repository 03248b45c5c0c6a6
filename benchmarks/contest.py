"""The ways of one case of :mod:`benchmarks.compare`, taking turns."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.compare_trainers import Place
from benchmarks.compare_ways import WAYS, play, turn_of
from benchmarks.harness import quartiles
from benchmarks.turns import Answer, Player, PlayerError

SUBJECT, YARDSTICK = "fdg", "bp-2"  # of WAYS

Row = dict[str, Any]


class Contest:
    """Rounds, in each of which every way has a turn, in sittings, each with processes started anew.

    A process keeps for life what it was dealt when it began, such as where its memory lies: two of the
    same program differ by some percent, in every round. Only new ones show that as the chance it is.

    Args:
        ways: by name.
        places: of a way's processes in a sitting.
        limit: seconds after which a process is given up for hung.
    """

    def __init__(
        self, ways: list[str], places: Callable[[str, int], list[Place]], limit: float
    ) -> None:
        self.errors: dict[str, str] = {}
        self._sittings: list[list[dict[str, float]]] = []  # of rounds
        self._ways = ways
        self._places = places
        self._limit = limit
        self._steps: dict[str, tuple[int, int]] = {}
        self._answers: dict[str, list[list[Answer]]] = {name: [] for name in ways}
        self._players: dict[str, Player] = {}

    def begin_sitting(self) -> None:
        """Start processes for every way that has not failed."""
        # All import at once, and get ready one after the other.
        for name in self._ways:
            if name not in self.errors:
                places = self._places(name, len(self._sittings))
                makes = [partial(play, WAYS[name], place) for place in places]
                self._players[name] = Player(makes, self._limit, WAYS[name].environment)
        self._sittings.append([])
        for name in list(self._players):
            try:
                self._players[name].get_ready()
                answers = self._players[name].turn(1, 1)
            except PlayerError as error:
                self._give_up(name, error)
            else:
                self._steps[name] = turn_of(max(a.value.seconds_per_step for a in answers))

    def round(self) -> None:
        """A turn for everyone, in an order of its own."""
        names = list(self._players)
        seconds = {}
        for name in random.Random(len(self._rounds())).sample(names, len(names)):
            try:
                answers = self._players[name].turn(*self._steps[name])
            except PlayerError as error:
                self._give_up(name, error)
                continue
            self._answers[name].append(answers)
            seconds[name] = max(answer.value.seconds_per_step for answer in answers)
        self._sittings[-1].append(seconds)

    def end_sitting(self) -> None:
        with ExitStack() as stack:  # an interrupt of one leaves none
            for player in self._players.values():
                stack.callback(player.stop)
            self._players = {}

    def row(self, name: str) -> Row:
        """What is known of a way in the end."""
        if name in self.errors:
            return {"error": self.errors[name]}
        turns = self._answers[name]
        idle = sum(answer.idle_seconds for answer in (answers[0] for answers in turns))
        cpu = sum(answer.idle_cpu_seconds for answers in turns for answer in answers)
        most = max(turns, key=peak_bytes)
        return {
            "seconds_per_step": quartiles([r[name] for r in self._rounds()]),
            "fdg_ratio": self._ratio(SUBJECT, name),
            "to_bp_2": self._ratio(name, YARDSTICK),
            "peak_bytes": peak_bytes(most),
            "start_bytes": sum(answer.value.start_bytes for answer in most),
            "idle_cpu_share": cpu / idle,
            "seconds_by_sitting": [[r[name] for r in rounds] for rounds in self._sittings],
        }

    def _rounds(self) -> list[dict[str, float]]:
        return [each for rounds in self._sittings for each in rounds]

    def _ratio(self, a: str, b: str) -> dict[str, float] | None:
        if not {a, b} <= set(self._ways) - self.errors.keys():
            return None
        return quartiles([r[a] / r[b] for r in self._rounds()])

    def _give_up(self, name: str, error: PlayerError) -> None:
        self.errors[name] = str(error)
        del self._players[name]


def peak_bytes(answers: list[Answer]) -> int:
    """Of a way's processes together."""
    return sum(answer.peak_bytes for answer in answers)
