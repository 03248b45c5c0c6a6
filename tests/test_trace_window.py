"""Windows of ticks as text."""

from __future__ import annotations

import pytest

from fdg_cuda.trace_window import read_window


@pytest.mark.parametrize(
    ("text", "window"),
    [("100:150", (100, 50)), ("0:1", (0, 1)), (" 7 : 9 ", (7, 2)), ("007:10", (7, 3))],
)
def test_a_window_is_what_is_skipped_and_what_is_recorded(
    text: str, window: tuple[int, int]
) -> None:
    assert read_window(text) == window


@pytest.mark.parametrize(
    "text",
    ["", "100", ":150", "100:", "100-150", "-5:10", "1:2:3", "1.5:3", "a:b", "١:٢", "1 0:20"],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 100:150 for ticks 100 to 149; got '"):
        read_window(text)


@pytest.mark.parametrize("text", ["100:100", "100:50"])
def test_a_window_without_a_tick_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 100:150 for 100 to 149; got '100:"):
        read_window(text)
