"""``benchmarks.turns``: sides in processes of their own, and what becomes of those that fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.turns import Player, PlayerError

LIMIT = 30.0


def counting(step: int) -> Callable[[], int]:
    turns = iter(range(step, 100, step))
    return lambda: next(turns)


def raising(rank: int) -> Callable[[], None]:
    def turn() -> None:
        if rank == 0:
            raise ValueError("\n  the first line\nthe second")
        time.sleep(LIMIT)  # as whoever waits for a peer

    return turn


def dying() -> Callable[[], None]:
    return lambda: os._exit(3)


def hanging() -> Callable[[], None]:
    return lambda: time.sleep(LIMIT)


def unmade() -> Callable[[], None]:
    raise RuntimeError("cannot be made")


def test_a_turn_is_one_in_every_process_and_the_idle_compute_nothing() -> None:
    player = Player([partial(counting, 1), partial(counting, 10)], LIMIT)
    player.get_ready()
    assert [answer.value for answer in player.turn()] == [1, 10]
    time.sleep(0.2)
    answers = player.turn()
    assert [answer.value for answer in answers] == [2, 20]
    for answer in answers:
        assert answer.idle_seconds > 0.15
        assert answer.idle_cpu_seconds < 0.05
        assert answer.peak_bytes > 1e6
    player.stop()
    player.stop()


def test_one_that_fails_says_why_and_leaves_no_process() -> None:
    unable, failing, dead = (
        Player(makes, LIMIT)
        for makes in ([unmade], [partial(raising, 0), partial(raising, 1)], [dying])
    )
    with pytest.raises(PlayerError, match=r"^RuntimeError: cannot be made$"):
        unable.get_ready()
    failing.get_ready()
    with pytest.raises(PlayerError, match=r"^ValueError: the first line$"):
        failing.turn()
    dead.get_ready()
    with pytest.raises(PlayerError, match="ended by itself, exit code 3"):
        dead.turn()
    for player in (unable, failing, dead):
        assert not any(process.is_alive() for process in player._processes)


def test_one_that_hangs_is_given_up() -> None:
    player = Player([hanging], 3.0)
    player.get_ready()
    with pytest.raises(PlayerError, match="no answer within 3 s"):
        player.turn()
    assert not player._processes[0].is_alive()
