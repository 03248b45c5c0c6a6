"""The rule, against tables drawn by hand."""

from __future__ import annotations

import pytest

from fdg_cuda.schedule import METHODS, Action, Kind, Schedule

# One row per stage, one column per tick, what happens in it in order. Sends and weight copies are
# left out; N = 6 batches.
TABLES = {
    ("fdg", 1): ["0F0 0B0 0U0|0F1 0B1 0U1|0F2 0B2 0U2|0F3 0B3 0U3|0F4 0B4 0U4|0F5 0B5 0U5"],
    ("fdg", 2): [
        "0F0|0F1|0B0 0U0 0F2|0B1 0U1 0F3|0B2 0U2 0F4|0B3 0U3 0F5|0B4 0U4|0B5 0U5",
        "|1F0 1B0 1U0|1F1 1B1 1U1|1F2 1B2 1U2|1F3 1B3 1U3|1F4 1B4 1U4|1F5 1B5 1U5|",
    ],
    ("fdg", 3): [
        "0F0|0F1|0F2|0F3|0B0 0U0 0F4|0B1 0U1 0F5|0B2 0U2|0B3 0U3|0B4 0U4|0B5 0U5",
        "|1F0|1F1|1B0 1U0 1F2|1B1 1U1 1F3|1B2 1U2 1F4|1B3 1U3 1F5|1B4 1U4|1B5 1U5|",
        "||2F0 2B0 2U0|2F1 2B1 2U1|2F2 2B2 2U2|2F3 2B3 2U3|2F4 2B4 2U4|2F5 2B5 2U5||",
    ],
    ("ddg", 3): [
        "0F0|0F1|0F2 0B0 0U0|0F3 0B1 0U1|0F4 0B2 0U2|0F5 0B3 0U3|0B4 0U4|0B5 0U5",
        "1F0|1F1 1B0 1U0|1F2 1B1 1U1|1F3 1B2 1U2|1F4 1B3 1U3|1F5 1B4 1U4|1B5 1U5|",
        "2F0 2B0 2U0|2F1 2B1 2U1|2F2 2B2 2U2|2F3 2B3 2U3|2F4 2B4 2U4|2F5 2B5 2U5||",
    ],
    ("bp", 2): [
        "0F0 0B0 0U0|0F1 0B1 0U1|0F2 0B2 0U2|0F3 0B3 0U3|0F4 0B4 0U4|0F5 0B5 0U5",
        "1F0 1B0 1U0|1F1 1B1 1U1|1F2 1B2 1U2|1F3 1B3 1U3|1F4 1B4 1U4|1F5 1B5 1U5",
    ],
}
# One update per two batches; N is the key's last entry.
ACCUMULATED = {
    ("fdg", 1, 3): ["0F0 0B0|0F1 0B1 0U1|0F2 0B2|0U2"],
    ("fdg", 2, 4): [
        "0F0|0F1|0B0 0F2|0B1 0U1 0F3|0B2|0B3 0U3",
        "|1F0 1B0|1F1 1B1 1U1|1F2 1B2|1F3 1B3 1U3|",
    ],
    ("fdg", 2, 5): [
        "0F0|0F1|0B0 0F2|0B1 0U1 0F3|0B2 0F4|0B3 0U3|0B4|0U4",
        "|1F0 1B0|1F1 1B1 1U1|1F2 1B2|1F3 1B3 1U3|1F4 1B4|1U4|",
    ],
    ("fdg", 3, 1): ["0F0||||0B0|0U0", "|1F0||1B0|1U0|", "||2F0 2B0|2U0||"],
    ("ddg", 3, 3): [
        "0F0|0F1|0F2 0B0|0B1 0U1|0B2|0U2",
        "1F0|1F1 1B0|1F2 1B1 1U1|1B2|1U2|",
        "2F0 2B0|2F1 2B1 2U1|2F2 2B2|2U2||",
    ],
    ("bp", 2, 3): ["0F0 0B0|0F1 0B1 0U1|0F2 0B2|0U2", "1F0 1B0|1F1 1B1 1U1|1F2 1B2|1U2"],
}
SHOWN = (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)


@pytest.mark.parametrize(("method", "stages"), TABLES)
def test_epoch_equals_the_hand_drawn_table(method: str, stages: int) -> None:
    schedule = Schedule(method, stages)
    ticks = list(schedule.epoch(6))
    for stage, row in enumerate(TABLES[method, stages]):
        drawn = [cell.split() for cell in row.split("|")]
        played = [[str(a) for a in t if a.stage == stage and a.kind in SHOWN] for t in ticks]
        assert played == drawn, f"stage {stage}"


@pytest.mark.parametrize(("method", "stages", "batches"), ACCUMULATED)
def test_epoch_of_an_update_per_two_batches_equals_the_hand_drawn_table(
    method: str, stages: int, batches: int
) -> None:
    schedule = Schedule(method, stages, accumulate=2)
    ticks = list(schedule.epoch(batches))
    assert len(ticks) == schedule.ticks(batches)
    for stage, row in enumerate(ACCUMULATED[method, stages, batches]):
        drawn = [cell.split() for cell in row.split("|")]
        played = [[str(a) for a in t if a.stage == stage and a.kind in SHOWN] for t in ticks]
        assert played == drawn, f"stage {stage}"


def test_weights_move_on_behind_a_backward_without_update() -> None:
    """fdg, stage 0 of 3: four slots, three batches per update, seven batches."""
    shown = [
        (tick, str(a), a.source, a.slot)
        for tick, actions in enumerate(Schedule("fdg", 3, accumulate=3).epoch(7))
        for a in actions
        if a.stage == 0 and a.kind in (Kind.COPY_WEIGHTS, Kind.UPDATE)
    ]
    assert shown == [
        # During fill, before the forwards of batches 1 to 3.
        (1, "0C1", 0, 1),
        (2, "0C2", 1, 2),
        (3, "0C3", 2, 3),
        # Behind backwards; that of batch 0 is in tick 4, when all slots hold the same weights.
        (5, "0C1", 0, 1),
        (6, "0U2", 1, 2),
        (7, "0C3", 2, 3),
        (8, "0C4", 3, 0),
        (9, "0U5", 0, 1),
        (10, "0C6", 1, 2),
        # What is left, in place.
        (11, "0U6", 2, 2),
    ]


def test_bp_runs_the_stages_up_and_down_within_a_tick() -> None:
    (tick,) = Schedule("bp", 3).epoch(1)
    shown = [str(a) for a in tick]
    assert shown == [
        "0F0",
        "0A0",
        "1F0",
        "1A0",
        "2F0",
        "2B0",
        "2E0",
        "2U0",
        "1B0",
        "1E0",
        "1U0",
        "0B0",
        "0U0",
    ]


def test_ddg_forwards_climb_within_a_tick() -> None:
    ticks = list(Schedule("ddg", 3).epoch(2))
    assert [str(a) for a in ticks[0] if a.kind is Kind.FORWARD] == ["0F0", "1F0", "2F0"]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batches", [0, 1, 2, 5, 40])
def test_every_batch_is_worked_once_by_every_stage(method: str, stages: int, batches: int) -> None:
    schedule = Schedule(method, stages)
    actions = [action for tick in schedule.epoch(batches) for action in tick]
    for kind in SHOWN:
        for stage in range(stages):
            mine = [a.batch for a in actions if a.kind is kind and a.stage == stage]
            assert mine == list(range(batches))


@pytest.mark.parametrize("stages", range(1, 9))
def test_staleness_is_the_updates_counted_between_forward_and_own_update(stages: int) -> None:
    for method in METHODS:
        schedule = Schedule(method, stages)
        for stage in range(stages):
            order = [a for tick in schedule.epoch(40) for a in tick if a.stage == stage]
            batch = 25
            forward = order.index(next(a for a in order if str(a) == f"{stage}F{batch}"))
            update = order.index(next(a for a in order if str(a) == f"{stage}U{batch}"))
            between = sum(a.kind is Kind.UPDATE for a in order[forward:update])
            assert between == schedule.staleness(stage)
            expected = {
                "fdg": 2 * (stages - 1 - stage) - 1 if stage < stages - 1 else 0,
                "ddg": stages - 1 - stage,
                "bp": 0,
            }
            assert between == expected[method]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
@pytest.mark.parametrize("stages", range(1, 9))
def test_slots_hold_one_batch_at_a_time_and_the_newest_weights_when_forwarded(
    stages: int, accumulate: int
) -> None:
    """Plays an epoch on weight copies that only remember how many updates went into them."""
    for method in METHODS:
        schedule = Schedule(method, stages, accumulate)
        for batches in (1, 2, 3, 17):
            for stage in range(stages):
                n = schedule.slots(stage)
                versions: list[int | None] = [None] * n
                versions[schedule.first_slot(stage)] = 0
                held: list[int | None] = [None] * n
                updates = backwards = 0
                for tick in schedule.epoch(batches):
                    for action in (a for a in tick if a.stage == stage):
                        if action.kind is Kind.COPY_WEIGHTS:
                            assert held[action.slot] is None
                            assert versions[action.source] == updates
                            versions[action.slot] = versions[action.source]
                        elif action.kind is Kind.FORWARD:
                            assert held[action.slot] is None
                            assert versions[action.slot] == updates
                            held[action.slot] = action.batch
                        elif action.kind is Kind.BACKWARD:
                            assert held[action.slot] == action.batch
                            held[action.slot] = None
                            backwards += 1
                        elif action.kind is Kind.UPDATE:
                            assert held[action.slot] is None
                            assert versions[action.source] == updates
                            assert backwards == min(batches, (updates + 1) * accumulate)
                            updates += 1
                            versions[action.slot] = updates
                assert updates == -(-batches // accumulate)


def test_slots_are_the_delay_and_never_less_than_one() -> None:
    assert [Schedule("fdg", 4).slots(k) for k in range(4)] == [6, 4, 2, 1]
    assert [Schedule("ddg", 4).slots(k) for k in range(4)] == [4, 3, 2, 1]
    assert [Schedule("bp", 4).slots(k) for k in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("accumulate", [2, 3, 4, 7])
def test_staleness_in_updates_is_divided(accumulate: int) -> None:
    """The most updates that any batch sees between its forward and its own update."""
    for method in METHODS:
        for stages in range(1, 6):
            schedule = Schedule(method, stages, accumulate)
            whole = Schedule(method, stages)
            for stage in range(stages):
                order = [a for tick in schedule.epoch(60) for a in tick if a.stage == stage]
                updates = [i for i, a in enumerate(order) if a.kind is Kind.UPDATE]
                between = [
                    updates.index(own) - sum(update < forward for update in updates)
                    for forward, action in enumerate(order)
                    if action.kind is Kind.FORWARD
                    for own in [updates[action.batch // accumulate]]
                ]
                assert max(between) == schedule.staleness(stage)
                assert schedule.staleness(stage) == -(-whole.staleness(stage) // accumulate)
                assert schedule.slots(stage) == whole.slots(stage)


def test_shrinks() -> None:
    assert [Schedule("fdg", 3).shrinks(k) for k in range(3)] == [2, 1, 0]
    assert [Schedule("bp", 3).shrinks(k) for k in range(3)] == [0, 0, 0]


def test_labels_are_compact() -> None:
    assert str(Action(Kind.FORWARD, stage=1, batch=7, slot=0)) == "1F7"


@pytest.mark.parametrize(("method", "stages"), [("gpipe", 2), ("fdg", 0)])
def test_impossible_schedules_are_refused(method: str, stages: int) -> None:
    with pytest.raises(ValueError, match=r"got '?(gpipe|0)"):
        Schedule(method, stages)


def test_less_than_one_batch_per_update_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate must be at least 1 .* got 0"):
        Schedule("fdg", 2, accumulate=0)
