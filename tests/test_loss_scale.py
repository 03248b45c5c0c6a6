"""The rule of the loss scale, without any training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdg_cuda.loss_scale import FIRST_SCALE, SMALLEST_SCALE, BatchScales, LossScale, all_finite


def test_it_doubles_after_so_many_finite_batches() -> None:
    scale = LossScale(patience=3)
    seen = []
    for _ in range(7):
        seen.append(scale.value)
        scale.add(scale.value, finite=True)
    assert seen == [FIRST_SCALE] * 3 + [2 * FIRST_SCALE] * 3 + [4 * FIRST_SCALE]


def test_an_overflow_begins_the_count_anew() -> None:
    scale = LossScale(8.0, patience=3)
    for finite in (True, True, False, True, True):
        scale.add(scale.value, finite=finite)
    assert scale.value == 4.0
    scale.add(4.0, finite=True)
    assert scale.value == 8.0


def test_batches_in_flight_with_the_first_that_overflowed_halve_it_once() -> None:
    scale = LossScale(8.0)
    for _ in range(5):
        scale.add(8.0, finite=False)
    assert scale.value == 4.0
    scale.add(4.0, finite=False)
    assert scale.value == 2.0


def test_batches_under_an_older_scale_do_not_let_it_grow() -> None:
    scale = LossScale(8.0, patience=2)
    scale.add(8.0, finite=False)
    for _ in range(9):
        scale.add(8.0, finite=True)
    assert scale.value == 4.0


def test_a_batch_under_the_scale_before_the_last_growth_brings_it_down_below_that() -> None:
    scale = LossScale(8.0, patience=1)
    scale.add(8.0, finite=True)
    assert scale.value == 16.0
    scale.add(8.0, finite=False)
    assert scale.value == 4.0


def test_there_is_a_smallest_one() -> None:
    scale = LossScale()
    for _ in range(100):
        scale.add(scale.value, finite=False)
    assert scale.value == SMALLEST_SCALE


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 6), st.integers(1, 5))
def test_under_any_outcomes_and_lag(outcomes: list[bool], lag: int, patience: int) -> None:
    """Against the rule written down once more, over the whole past; and going on from a state."""
    scale, used = LossScale(patience=patience), []
    for number in range(len(outcomes) + lag):
        if number >= lag:
            scale.add(used[number - lag], finite=outcomes[number - lag])
        used.append(scale.value)
        kept, scale = scale.state_dict(), LossScale(patience=patience)
        scale.load_state_dict(kept)
    value, streak = FIRST_SCALE, 0
    for number in range(len(used)):
        past = number - lag
        if past >= 0:
            if not outcomes[past]:
                value, streak = max(SMALLEST_SCALE, min(value, used[past] / 2)), 0
            elif used[past] == value:
                streak += 1
            if streak == patience:
                value, streak = 2 * value, 0
        assert used[number] == value
        assert math.log2(value).is_integer()
    # However many were in flight: one overflow halves once, so what was halved fits the outcomes.
    bad = outcomes.count(False)
    assert min(used, default=FIRST_SCALE) >= max(SMALLEST_SCALE, FIRST_SCALE / 2**bad)


def batch_scales(**options: int) -> BatchScales:
    finite = torch.zeros(4, 3, dtype=torch.bool)
    scale = LossScale(8.0)
    return BatchScales(scale, finite, asynchronous=False, **{"accumulate": 1, **options})


def report(scales: BatchScales, batch: int, *finite: bool) -> None:
    scales.enter(batch)
    for stage, one in enumerate(finite):
        scales.report(batch, stage, one if batch % 2 else torch.tensor(one))


def test_skipped_updates_are_counted_by_stage() -> None:
    scales = batch_scales()
    for batch in range(9):
        report(scales, batch, batch not in (2, 5), batch != 2, True)
        scales.learn(batch - 1)
    scales.learn(9)
    assert scales.skipped == [2, 1, 0]
    assert (scales.of(8), scales.value) == (2.0, 2.0)
    scales.begin()
    assert scales.skipped == [0, 0, 0]
    assert scales.value == 2.0


def test_several_batches_make_one_update() -> None:
    scales = batch_scales(accumulate=3)
    for batch in range(7):
        report(scales, batch, batch not in (1, 2, 6), True, True)
        scales.learn(batch + 1)
    assert scales.skipped == [2, 0, 0]


def test_the_batch_that_no_scale_helps_is_named() -> None:
    scales = batch_scales()
    scales._scale.value = 2 * SMALLEST_SCALE
    for batch in range(4):
        report(scales, batch, batch == 0, True, True)
    assert scales.learn(4) is None
    for batch in range(4, 6):
        report(scales, batch, batch == 4, True, True)
    assert scales.learn(6) == 5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_element_counts(dtype: torch.dtype, value: float) -> None:
    one, other = torch.full((3, 5), 60000.0, dtype=dtype), torch.ones(7)
    empty = torch.empty(0)
    assert all_finite([one, other, empty])
    assert all_finite([one]).shape == ()
    one[2, 4] = value
    assert not all_finite([one, other, empty])
    assert not all_finite([other, one])
