"""The race detector finds what it should: programs with a wait, a copy or a keep-alive too few.

That it finds nothing in the program as it is, every other test of this folder shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from chains import batches, even_split, mlp
from torch import Tensor, nn

from fdg_cuda import FDGRunner, _core
from fdg_cuda.accelerator import accelerator
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.cuda_pipeline import CudaPipeline
from fdg_cuda.cuda_stage import CudaStage
from fdg_cuda.layout import CudaLayout, Step, Transfer
from fdg_cuda.mail import Inbox, Outbox, word
from fdg_cuda.schedule import Action, Kind

UNORDERED = "touch the same memory and nothing orders them"
GIVEN_BACK = "was given back"


def take_violations(stand_in: Any) -> list[str]:
    """What was found so far, which the test expected."""
    found = list(stand_in.violations)
    stand_in.reset()
    return found


def train(
    stages: int,
    model: nn.Sequential | None = None,
    *,
    split: list[int] | None = None,
    staged: bool = False,
    count: int = 9,
    loss_fn: Any = nn.functional.cross_entropy,
    data: list[Any] | None = None,
    **options: Any,
) -> None:
    runner = FDGRunner(
        model or mlp(),
        [0] * stages,
        split=split or even_split(8, stages),
        lr=0.05,
        loss_fn=loss_fn,
        **options,
    )
    runner._machine.stage_every_hop = staged  # type: ignore[attr-defined]
    runner.fit(data or batches(count, last=None))


# -- small programs ----------------------------------------------------------------------------------


class Copies:
    """Three pieces of memory, and copies between them on two streams of a device."""

    def __init__(self) -> None:
        self.scheduler = _core.Scheduler("cuda", ["a", "b"], devices=[0, 0])
        self.memory = [torch.zeros(8) for _ in range(3)]
        self.addresses = np.array([m.data_ptr() for m in self.memory], dtype=np.uint64)
        self.bytes = np.array([self.memory[0].nbytes], dtype=np.uint64)
        self.buffers = [self.scheduler.add_buffer(f"m{i}", shared=True) for i in range(3)]
        accelerator().synchronize(0)

    def copy(self, source: int, target: int, stream: int, *, declared: bool) -> int:
        return self.scheduler.add_action(
            code="C",
            stage=0,
            slot=0,
            stream=stream,
            reads=[self.buffers[source]] if declared else [],
            writes=[self.buffers[target]] if declared else [],
            work=_core.CudaCopy(
                source=word(self.addresses, source),
                source_device=0,
                target=word(self.addresses, target),
                target_device=0,
                bytes=word(self.bytes, 0),
            ),
        )

    def run(self, *actions: int) -> None:
        """In one tick."""
        self.scheduler.submit(self.scheduler.add_tick([(action, 0) for action in actions]), 0)

    def handle(self, stream: int) -> int:
        return self.scheduler.stream_handle(stream)


@pytest.fixture
def copies() -> Iterator[Copies]:
    made = Copies()
    yield made
    made.scheduler.close()


CONFLICTS = {
    "write, read": ((0, 1), (1, 2)),
    "read, write": ((1, 2), (0, 1)),
    "write, write": ((0, 2), (1, 2)),
}


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("conflict", CONFLICTS)
def test_conflicting_copies_must_be_ordered(
    stand_in: Any, copies: Copies, conflict: str, declared: bool
) -> None:
    one, other = CONFLICTS[conflict]
    copies.run(
        copies.copy(*one, stream=0, declared=declared),
        copies.copy(*other, stream=1, declared=declared),
    )
    copies.scheduler.synchronize()
    found = take_violations(stand_in)
    assert len(found) == (not declared)
    for text in found:
        assert UNORDERED in text
        assert text.count("cudaMemcpyAsync on stream") == 2


def test_what_does_not_conflict_needs_no_order(copies: Copies) -> None:
    """Two readers; one stream; what the host waited for."""
    copies.run(
        copies.copy(0, 1, stream=0, declared=False), copies.copy(0, 2, stream=1, declared=False)
    )
    copies.run(copies.copy(1, 1, stream=0, declared=False))
    copies.scheduler.synchronize()
    copies.run(copies.copy(1, 0, stream=1, declared=False))


def test_a_wait_orders_only_what_was_recorded(stand_in: Any, copies: Copies) -> None:
    """What the first stream does after the record is not waited for."""
    copies.run(
        copies.copy(0, 1, stream=0, declared=True),
        copies.copy(0, 2, stream=0, declared=False),
        copies.copy(1, 2, stream=1, declared=True),
    )
    assert len(take_violations(stand_in)) == 1


def test_torch_is_seen_too(stand_in: Any, copies: Copies) -> None:
    lanes = [accelerator().lane(0, copies.handle(stream)) for stream in (0, 1)]
    with accelerator().on(lanes[0]):
        copies.memory[0][:3].add_(1)
    with accelerator().on(lanes[1]):
        copies.memory[0][3:].mul_(2)
    assert take_violations(stand_in) == []
    with accelerator().on(lanes[1]):
        copies.memory[1] + copies.memory[0]
    (found,) = take_violations(stand_in)
    assert "add_" in found
    assert "add (" in found


def test_gaps_between_elements_are_nobodys(stand_in: Any, copies: Copies) -> None:
    lanes = [accelerator().lane(0, copies.handle(stream)) for stream in (0, 1)]
    square = torch.zeros(4, 6)
    accelerator().synchronize(0)
    with accelerator().on(lanes[0]):
        square[:, :3].add_(1)
        square.t()[5].add_(1)
    with accelerator().on(lanes[1]):
        square[:, 3:5].t().contiguous()
    assert take_violations(stand_in) == []
    with accelerator().on(lanes[1]):
        square[2:, 2:].exp()
    assert take_violations(stand_in) != []


def test_a_backward_is_seen_too(stand_in: Any, copies: Copies) -> None:
    lanes = [accelerator().lane(0, copies.handle(stream)) for stream in (0, 1)]
    weights = nn.Parameter(torch.ones(3))
    accelerator().synchronize(0)
    for other in (0, 1):
        with accelerator().on(lanes[0]):
            loss = weights.exp().sum()
        with accelerator().on(lanes[other]):
            loss.backward()
        weights.grad = None
        found = take_violations(stand_in)
        assert any("exp (" in text and "mul (" in text for text in found) == (other == 1)
        accelerator().synchronize(0)


def test_memory_must_not_be_given_back_while_a_copy_reads_it(stand_in: Any, copies: Copies) -> None:
    lane = accelerator().lane(0, copies.handle(0))
    for wait in (True, False):
        with accelerator().on(lane):
            copies.memory[0] = torch.zeros(8)
        copies.addresses[0] = copies.memory[0].data_ptr()
        accelerator().synchronize(0)
        copies.run(copies.copy(0, 1, stream=1, declared=False))
        if wait:
            accelerator().synchronize(0)
        with accelerator().on(lane):
            copies.memory[0] = torch.zeros(8)
        found = take_violations(stand_in)
        assert len(found) == (not wait)
        assert all(GIVEN_BACK in text and "may still use it" in text for text in found)
        accelerator().synchronize(0)


def test_memory_that_was_given_back_must_not_be_copied(stand_in: Any, copies: Copies) -> None:
    lane = accelerator().lane(0, copies.handle(0))
    with accelerator().on(lane):
        copies.addresses[0] = torch.zeros(8).data_ptr()
    copies.run(copies.copy(0, 1, stream=0, declared=False))
    (found,) = take_violations(stand_in)
    assert "nobody allocated" in found


# -- the real program, with a declared access too few ------------------------------------------------

H = "the error signal it reads comes after what the stage above made of the slot's output"
M = "writing it asks for the same waits"
Y = "the labels come after the activation on the same stream, and the same forward reads both"
Access = tuple[Kind | Transfer, str, str]

# Dropping these leaves no race behind, as another access implies the same waits.
IMPLIED: dict[Access, str] = {
    (Kind.BACKWARD, "reads", "h"): M,
    (Kind.BACKWARD, "writes", "h"): H,
}
# With two stages that go through the host's memory, these neither.
IMPLIED_FOR_TWO_STAGED: dict[Access, str] = {
    (Kind.FORWARD, "reads", "a"): Y,
    (Transfer.RECEIVE_ACTIVATION, "writes", "a"): Y,
}
DIRECT: list[Access] = [
    (Transfer.LOAD_INPUT, "writes", "x"),
    (Transfer.LOAD_TARGET, "writes", "y"),
    (Transfer.READ_METRICS, "reads", "m"),
    (Kind.FORWARD, "reads", "a"),
    (Kind.FORWARD, "reads", "x"),
    (Kind.FORWARD, "reads", "y"),
    (Kind.FORWARD, "writes", "h"),
    (Kind.FORWARD, "writes", "m"),
    (Kind.SEND_ACTIVATION, "reads", "h"),
    (Kind.SEND_ACTIVATION, "writes", "a"),
    (Kind.BACKWARD, "reads", "h"),
    (Kind.BACKWARD, "reads", "e"),
    (Kind.BACKWARD, "writes", "h"),
    (Kind.BACKWARD, "writes", "d"),
    (Kind.SEND_ERROR, "reads", "d"),
    (Kind.SEND_ERROR, "writes", "e"),
]
STAGED: list[Access] = [
    *(a for a in DIRECT if a[::2] not in ((Kind.SEND_ACTIVATION, "a"), (Kind.SEND_ERROR, "e"))),
    (Kind.SEND_ACTIVATION, "writes", "A"),
    (Kind.SEND_ERROR, "writes", "E"),
    (Transfer.RECEIVE_ACTIVATION, "reads", "A"),
    (Transfer.RECEIVE_ACTIVATION, "writes", "a"),
    (Transfer.RECEIVE_ERROR, "reads", "E"),
    (Transfer.RECEIVE_ERROR, "writes", "e"),
]
STEPS = CudaLayout.steps


def without(access: Access) -> Callable[[CudaLayout, Action], Iterator[Step]]:
    kind, what, letter = access

    def steps(self: CudaLayout, action: Action) -> Iterator[Step]:
        for step in STEPS(self, action):
            kept = tuple(buffer for buffer in getattr(step, what) if buffer[0] != letter)
            yield dataclasses.replace(step, **{what: kept}) if step.kind is kind else step

    return steps


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_the_tables_name_every_declared_access_that_streams_share(staged: bool) -> None:
    from fdg_cuda.schedule import Schedule

    declared = set()
    schedule = Schedule("fdg", 3)
    layout = CudaLayout(schedule, BackwardWeights.STASH, staged=[staged] * 2)
    for tick in range(20):
        for action in schedule.tick(tick, None):
            for step in layout.steps(action):
                for what in ("reads", "writes"):
                    for buffer in filter(layout.is_shared, getattr(step, what)):
                        declared.add((step.kind, what, buffer[0]))
    assert declared == set(STAGED if staged else DIRECT)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("staged", "access"),
    [*((False, access) for access in DIRECT), *((True, access) for access in STAGED)],
    ids=lambda value: (
        f"{value[0].value} {value[1]} {value[2]}"
        if isinstance(value, tuple)
        else ("direct", "staged")[value]
    ),
)
def test_without_any_declared_access(
    stand_in: Any,
    monkeypatch: pytest.MonkeyPatch,
    stages: int,
    graphs: bool,
    staged: bool,
    access: Access,
) -> None:
    implied = access in IMPLIED or (staged and stages == 2 and access in IMPLIED_FOR_TWO_STAGED)
    monkeypatch.setattr(CudaLayout, "steps", without(access))
    train(stages, staged=staged, graphs=graphs)
    found = take_violations(stand_in)
    if implied:
        assert found == []
    else:
        assert any(UNORDERED in text or GIVEN_BACK in text for text in found)


# -- the real program, with a copy, a keep-alive or a wait of the host's too few ----------------------


class Shift(nn.Module):
    """Its parameter's gradient is a view of the error signal."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.shift = nn.Parameter(torch.zeros(*shape, dtype=torch.float64).flatten())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.view(self.shape)


class Slice(nn.Module):
    """Its output has gaps, so that a copy of it is sent."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
def test_gradients_may_be_the_error_signal_so_it_is_copied(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch, stages: int, method: str
) -> None:
    def fit() -> list[str]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 12), Shift(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        ).double()
        train(stages, model, split=[2, 3][: stages - 1], method=method, graphs=False)
        return take_violations(stand_in)

    def take_errors(self: CudaStage, batch: int) -> list[Tensor] | None:
        parcel = self.mail.errors.parcel(batch % 2)
        return None if parcel is None else [self.mail.errors.view(batch % 2, parcel.form)]

    assert fit() == []
    monkeypatch.setattr(CudaStage, "_take_errors", take_errors)
    # Elsewhere the error signal of the batch after the next, which is written to the same half,
    # goes back to an activation that stage 0 sent after that update.
    found = fit()
    assert any("launch_sgd" in text for text in found) == (stages == 3 and method != "bp")
    assert bool(found) == (stages == 3 and method != "bp")


def test_a_backward_may_need_the_labels_so_they_are_copied(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_target(self: CudaStage, batch: int) -> Tensor:
        return self.mail.targets.view(batch % 2, self.fit.targets.form(batch))

    monkeypatch.setattr(CudaStage, "take_target", take_target)
    train(2, graphs=False)
    assert any("nll_loss_backward" in text for text in take_violations(stand_in))


def test_an_output_that_is_a_copy_is_kept_until_it_was_sent(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*layers: nn.Module) -> list[str]:
        model = nn.Sequential(nn.Linear(6, 12), *layers, nn.LazyLinear(4)).double()
        model(torch.zeros(8, 6, dtype=torch.float64))
        train(2, model, split=[1 + len(layers)], graphs=False)
        return take_violations(stand_in)

    pass_up = CudaStage._pass_up

    def forgetful(self: CudaStage, slot: int, batch: int, output: Tensor) -> None:
        pass_up(self, slot, batch, output)
        self.mail.outputs[slot] = None

    assert fit(Slice()) == []
    monkeypatch.setattr(CudaStage, "_pass_up", forgetful)
    assert any(GIVEN_BACK in text for text in fit(Slice()))
    # The slot itself keeps what is sent as it is.
    assert fit(nn.Tanh()) == []


def test_an_error_signal_is_kept_until_it_was_sent(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_down = CudaStage._pass_down

    def forgetful(self: CudaStage, batch: int, leaves: list[Tensor]) -> None:
        pass_down(self, batch, leaves)
        self.mail.error = None

    monkeypatch.setattr(CudaStage, "_pass_down", forgetful)
    train(2, graphs=False)
    assert any(GIVEN_BACK in text for text in take_violations(stand_in))


def test_an_inbox_takes_its_memory_where_nothing_else_allocates(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory the compute stream has just used, handed out for what another stream brings."""
    begin_fit = CudaStage.begin_fit

    def thrifty(self: CudaStage, fit: Any) -> None:
        begin_fit(self, fit)
        for inbox in (self.mail.inbox, self.mail.errors, self.mail.targets):
            inbox._lane = self.lane

    monkeypatch.setattr(CudaStage, "begin_fit", thrifty)
    train(3, graphs=False)
    assert any("memory that was given back" in text for text in take_violations(stand_in))


def test_an_inbox_that_grows_keeps_what_it_had(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = Inbox.reserve

    def forgetful(self: Inbox, half: int, nbytes: int) -> None:
        reserve(self, half, nbytes)
        self.forget()

    data = [batches(1, size=4 + i, last=None, seed=i)[0] for i in range(9)]
    train(3, graphs=False, staged=True, data=data)
    assert take_violations(stand_in) == []
    monkeypatch.setattr(Inbox, "reserve", forgetful)
    train(3, graphs=False, staged=True, data=data)
    assert any("may still use it" in text for text in take_violations(stand_in))


def test_the_streams_wait_for_what_was_done_before_the_epoch(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaPipeline, "_settle", lambda self: None)
    train(2, graphs=False)
    assert any("on the default stream" in text for text in take_violations(stand_in))


def test_a_row_is_written_anew_only_when_it_was_copied(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fit = CudaPipeline._make_fit

    def cramped(self: CudaPipeline, *args: Any) -> Any:
        fit = make_fit(self, *args)
        fit.inputs = Outbox(2)
        return fit

    monkeypatch.setattr(CudaPipeline, "_make_fit", cramped)
    train(2, graphs=False)
    assert any("on the host" in text for text in take_violations(stand_in))


def test_results_are_read_when_they_are_there(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = CudaPipeline._gather

    def hasty(self: CudaPipeline, done: int) -> None:
        gather(self, min(self._entered, done + 1) if done else 0)

    monkeypatch.setattr(CudaPipeline, "_gather", hasty)
    train(2, graphs=False)
    assert any("on the host" in text for text in take_violations(stand_in))


def test_hyper_parameters_take_turns_in_page_locked_memory(stand_in: Any) -> None:
    """They change with every batch; with too few turns one is written while it is copied."""

    def fit(ticks_in_flight: int | None) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            if ticks_in_flight is not None:
                made = _core.CudaSgd
                patch.setattr(
                    _core,
                    "CudaSgd",
                    lambda **options: made(**{**options, "ticks_in_flight": ticks_in_flight}),
                )
            runner = FDGRunner(mlp(), [0, 0], split=[4], lr=0.05, graphs=False)
            rates = torch.optim.lr_scheduler.ExponentialLR(runner.optimizer, 0.9)
            runner.fit(batches(12), lr_scheduler=rates, lr_step="batch")
        return take_violations(stand_in)

    assert fit(None) == []
    assert any("writing page-locked memory" in text for text in fit(1))
