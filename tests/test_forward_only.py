"""The rule of evaluation: every wait is there, and none too many."""

from __future__ import annotations

import pytest

from fdg_cuda._core import Operation, OperationKind, Scheduler, check_happens_before
from fdg_cuda.forward_only import ForwardLayout, ForwardSchedule
from fdg_cuda.program import NoWork, Program


def test_ticks() -> None:
    schedule = ForwardSchedule(3)
    ticks = [" ".join(map(str, schedule.tick(tick, 4))) for tick in range(4 + schedule.latency)]
    assert ticks == [
        "0F0 0A0",
        "0F1 0A1 1F0 1A0",
        "0F2 0A2 1F1 1A1 2F0",
        "0F3 0A3 1F2 1A2 2F1",
        "1F3 1A3 2F2",
        "2F3",
    ]
    assert schedule.tick(6, 4) == []


def enqueue(stages: int, batches: int) -> list[Operation]:
    schedule, layout = ForwardSchedule(stages), ForwardLayout(stages)
    scheduler = Scheduler("trace", layout.streams)
    program = Program(schedule, layout, scheduler, [NoWork() for _ in range(stages)])
    for tick in range(batches + schedule.latency):
        program.submit(tick, batches if tick >= batches else None)
    scheduler.synchronize()
    return scheduler.operations()


@pytest.mark.parametrize("stages", range(1, 9))
def test_every_conflict_is_ordered_and_every_batch_passes_every_stage(stages: int) -> None:
    for batches in (0, 1, 2, 3, 9):
        operations = enqueue(stages, batches)
        report = check_happens_before(operations)
        assert report.clean
        runs = [o for o in operations if o.kind == OperationKind.run]
        forwards = 0
        for run, sources in zip(runs, report.reads_from, strict=True):
            if run.code != "F":
                continue
            forwards += 1
            senders = [operations[s] for s in sources if s >= 0 and operations[s].code == "A"]
            assert [(s.stage, s.batch) for s in senders] == (
                [(run.stage - 1, run.batch)] if run.stage > 0 else []
            )
        assert forwards == stages * batches


@pytest.mark.parametrize("stages", range(2, 6))
def test_without_any_single_wait_the_check_fails(stages: int) -> None:
    operations = enqueue(stages, 7)
    waits = [i for i, o in enumerate(operations) if o.kind == OperationKind.wait]
    assert len(waits) > stages
    for index in waits:
        assert check_happens_before(operations[:index] + operations[index + 1 :]).races
