"""Cuts whose stages take far from the same time are warned of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from chains import batches, mlp
from torch import nn

from fdg_cuda import FDGRunner, machine
from fdg_cuda.cutting import Cut
from fdg_cuda.uneven import longest_in_means

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


def nested() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    ).double()


@pytest.mark.parametrize(
    ("seconds", "make", "said"),
    [
        (
            [0.09, 0.01],
            nested,
            "the longest of 2 stages takes 1.80 times their mean (cut at 1), and all wait for it: "
            "capture=True (--capture) cuts inside the children, too",
        ),
        (
            [0.01, 0.09],
            mlp,
            "the longest of 2 stages takes 1.80 times their mean (cut at 1), and all wait for it: no "
            "cut that fits is faster",
        ),
        ([0.05, 0.04], nested, None),
        ([0.0009, 0.0001], nested, None),
    ],
)
def test_a_measured_cut_far_from_even_is_warned_of(
    seconds: list[float],
    make: Any,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(machine, "best_cut", lambda *_, **__: Cut([1], seconds, [0.0, 0.0], []))
    runner = FDGRunner(make(), ["cpu"] * 2)
    with caplog.at_level(logging.WARNING, "fdg_cuda"):
        runner.fit(batches(2))
    assert caplog.messages == ([said] if said else [])


def test_stages_that_take_turns_wait_alike_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        machine, "best_cut", lambda *_, **__: Cut([1], [0.09, 0.01], [0.0, 0.0], [])
    )
    with caplog.at_level(logging.WARNING, "fdg_cuda"):
        FDGRunner(nested(), ["cpu"] * 2, method="bp").fit(batches(2))
    assert not caplog.messages


def test_a_cut_that_is_given_is_nobodys_business(caplog: pytest.LogCaptureFixture) -> None:
    big = nn.Sequential(nn.Linear(6, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 4), nn.Tanh())
    big.double()
    with caplog.at_level(logging.WARNING, "fdg_cuda"):
        FDGRunner(big, ["cpu"] * 2, split=[3]).fit(batches(2))
    assert not caplog.messages


def test_in_means() -> None:
    assert longest_in_means([1.0, 3.0]) == 1.5
    assert longest_in_means([0.0, 0.0]) == 1.0
