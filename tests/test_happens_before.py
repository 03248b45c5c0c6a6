"""The enqueued program is free of races and deadlocks, and every wait in it is necessary."""

from __future__ import annotations

import pytest

from fdg_cuda._core import Operation, OperationKind, Scheduler, check_happens_before
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.layout import CpuLayout, CudaLayout, Layout
from fdg_cuda.program import NoWork, Program
from fdg_cuda.schedule import METHODS, Schedule

# What a forward (backward) reads was brought by one of these.
BRINGERS = {"F": ("A", "RA"), "B": ("E", "RE")}
LAYOUTS = ("cpu", "cuda", "cuda staged", "cuda mixed")


def make_layout(name: str, schedule: Schedule, mode: BackwardWeights) -> Layout:
    if name == "cpu":
        return CpuLayout(schedule, mode)
    hops = range(schedule.stages - 1)
    staged = [name == "cuda staged" or (name == "cuda mixed" and hop % 2 == 0) for hop in hops]
    return CudaLayout(schedule, mode, staged=staged)


def enqueue(
    method: str,
    stages: int,
    batches: int,
    *,
    layout: str = "cpu",
    mode: BackwardWeights = BackwardWeights.STASH,
) -> list[Operation]:
    """The whole program of two epochs."""
    schedule = Schedule(method, stages)
    plan = make_layout(layout, schedule, mode)
    scheduler = Scheduler("trace", plan.streams)
    program = Program(schedule, plan, scheduler, [NoWork() for _ in range(stages)])
    for _ in range(2):
        for tick in range(batches + schedule.latency):
            program.submit(tick, batches if tick >= batches else None)
        scheduler.synchronize()
    return scheduler.operations()


def batches_to_wrap(stages: int) -> int:
    """Enough for every slot of every stage to be used three times, and an odd number."""
    return 3 * max(1, 2 * (stages - 1)) + 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", BackwardWeights, ids=lambda mode: mode.value)
@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("method", METHODS)
def test_every_conflict_is_ordered_and_nothing_deadlocks(
    method: str, stages: int, mode: BackwardWeights, layout: str
) -> None:
    for batches in (1, 2, batches_to_wrap(stages)):
        report = check_happens_before(enqueue(method, stages, batches, layout=layout, mode=mode))
        assert report.races == []
        assert report.deadlocks == []


@pytest.mark.parametrize(
    ("layout", "stages"),
    [
        *(("cpu", stages) for stages in range(2, 9)),
        *(("cuda", stages) for stages in range(1, 6)),
        *(("cuda mixed", stages) for stages in range(2, 5)),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_without_any_single_wait_the_check_fails(method: str, stages: int, layout: str) -> None:
    batches = batches_to_wrap(stages) if stages < 6 else 2 * stages
    operations = enqueue(method, stages, batches, layout=layout)
    waits = [i for i, o in enumerate(operations) if o.kind == OperationKind.wait]
    assert len(waits) > stages
    for index in waits:
        report = check_happens_before(operations[:index] + operations[index + 1 :])
        assert report.races, f"{operations[index]} is not necessary, or the check missed it"


@pytest.mark.parametrize("stages", range(2, 6))
@pytest.mark.parametrize("method", METHODS)
def test_without_any_single_record_the_check_finds_a_deadlock_or_nobody_waited(
    method: str, stages: int
) -> None:
    operations = enqueue(method, stages, batches_to_wrap(stages))
    waited = {(o.event, o.ticket) for o in operations if o.kind == OperationKind.wait}
    for index, o in enumerate(operations):
        if o.kind == OperationKind.record and (o.event, o.ticket) in waited:
            assert check_happens_before(operations[:index] + operations[index + 1 :]).deadlocks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stages", range(2, 9))
@pytest.mark.parametrize("method", METHODS)
def test_a_stage_reads_its_own_batch_from_its_neighbours(
    method: str, stages: int, layout: str
) -> None:
    """Ordered is not enough: what is read must be what the neighbour sent for that very batch."""
    operations = enqueue(method, stages, batches_to_wrap(stages), layout=layout)
    report = check_happens_before(operations)
    runs = [o for o in operations if o.kind == OperationKind.run]
    checked = 0
    for run, sources in zip(runs, report.reads_from, strict=True):
        if run.code not in BRINGERS or not sources:
            continue
        senders = [
            operations[s] for s in sources if s >= 0 and operations[s].code in BRINGERS[run.code]
        ]
        needs_mail = run.stage > 0 if run.code == "F" else run.stage < stages - 1
        assert len(senders) == needs_mail, run
        for sender in senders:
            assert sender.batch == run.batch
            neighbour = run.stage + (-1 if run.code == "F" else 1)
            assert sender.stage == (run.stage if sender.code.startswith("R") else neighbour)
            assert run.tick - sender.tick == (
                1 if method == "fdg" or (method == "ddg" and run.code == "B") else 0
            )
            checked += 1
    assert checked > 0


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("method", METHODS)
def test_copies_bring_what_belongs_to_their_batch(method: str, stages: int) -> None:
    """Each copy reads what its own batch's forward, backward or sender wrote; a forward reads its
    own batch's input and labels."""
    operations = enqueue(method, stages, batches_to_wrap(stages), layout="cuda staged")
    report = check_happens_before(operations)
    runs = [o for o in operations if o.kind == OperationKind.run]
    made_by = {"A": "F", "E": "B", "RA": "A", "RE": "E", "M": "F"}
    loaded = {"I": 0, "L": 0}
    for run, sources in zip(runs, report.reads_from, strict=True):
        writers = [operations[s] for s in sources if s >= 0]
        if run.code in made_by:
            (writer,) = writers
            assert (writer.code, writer.batch) == (made_by[run.code], run.batch)
        for writer in writers:
            if writer.code in loaded:
                assert (run.code, run.batch) == ("F", writer.batch)
                loaded[writer.code] += 1
    # Two epochs; every batch's input and labels are read once.
    assert set(loaded.values()) == {2 * batches_to_wrap(stages)}


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("method", METHODS)
def test_a_backward_uses_the_weights_of_its_forward_and_an_update_the_newest(
    method: str, stages: int
) -> None:
    operations = enqueue(method, stages, batches_to_wrap(stages))
    report = check_happens_before(operations)
    sources = dict(
        zip(
            (i for i, o in enumerate(operations) if o.kind == OperationKind.run),
            report.reads_from,
            strict=True,
        )
    )
    latest_update: dict[int, int] = {}
    weights_of: dict[tuple[int, int], int] = {}
    for index, o in enumerate(operations):
        if o.kind != OperationKind.run:
            continue
        if o.code == "F":
            weights_of[o.stage, o.batch] = sources[index][0]
        elif o.code == "B":
            assert sources[index][0] == weights_of[o.stage, o.batch]
        elif o.code == "U":
            newest = latest_update.get(o.stage)
            if newest is not None and o.batch > 0:
                assert sources[index][0] == newest
            latest_update[o.stage] = index


def operation(kind: OperationKind, stream: int, **fields: object) -> Operation:
    made = Operation()
    made.kind, made.stream = kind, stream
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_crossing_waits_are_a_deadlock() -> None:
    run, record, wait = OperationKind.run, OperationKind.record, OperationKind.wait
    program = [
        operation(wait, 0, event=1, ticket=1),
        operation(run, 0, code="F", writes=[0]),
        operation(record, 0, event=0, ticket=1),
        operation(wait, 1, event=0, ticket=1),
        operation(run, 1, code="F", reads=[0]),
        operation(record, 1, event=1, ticket=1),
    ]
    assert len(check_happens_before(program).deadlocks) == 2
    assert check_happens_before(program[1:]).clean


def test_two_streams_writing_one_buffer_race() -> None:
    run = OperationKind.run
    program = [
        operation(run, 0, code="U", stage=0, writes=[3]),
        operation(run, 1, code="U", stage=1, writes=[3]),
    ]
    (race,) = check_happens_before(program).races
    assert "0U0" in race
    assert "1U0" in race
    assert "buffer 3" in race


@pytest.mark.parametrize("layout", ["cuda", "cuda staged"])
@pytest.mark.parametrize("stages", range(2, 6))
def test_copies_overlap_what_follows(stages: int, layout: str) -> None:
    """In ``fdg`` a compute stream waits for its own copies of earlier ticks only: the error signal is
    sent under update and forward, the activation under the next tick's backward. Labels are loaded
    K-1 ticks behind their input."""
    operations = enqueue("fdg", stages, batches_to_wrap(stages), layout=layout)
    sent: dict[tuple[int, int], Operation] = {}  # by the record behind it
    latest: dict[int, Operation] = {}
    overlapped = 0
    for index, o in enumerate(operations):
        if o.kind == OperationKind.run:
            latest[o.stream] = o
            if o.code == "L":
                assert o.tick == o.batch + stages - 1
            if o.code == "I":
                assert o.tick == o.batch
        elif o.kind == OperationKind.record and o.stream in latest:
            sent[o.event, o.ticket] = latest[o.stream]
        elif o.kind == OperationKind.wait and o.stream % CudaLayout.STREAMS_PER_STAGE == 0:
            copied = sent[o.event, o.ticket]
            follows = next(
                later
                for later in operations[index:]
                if later.kind == OperationKind.run and later.stream == o.stream
            )
            if copied.stage == follows.stage and copied.code in ("A", "E"):
                # A backward frees what was sent long ago, or makes the next error signal.
                assert follows.code == "B"
                assert copied.tick < follows.tick
                overlapped += 1
    assert overlapped > 0
