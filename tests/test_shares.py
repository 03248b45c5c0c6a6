"""Where training time goes: stages at work, and waiting for data."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chains import Batch
from torch import Tensor, nn

from fdg_cuda import BatchResult, Callback, Checkpoints, EpochResult, FDGRunner, Shares
from fdg_cuda._core import Scheduler
from fdg_cuda.shares import Spent

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left")

SLEEP = 0.004


class Sleeping(nn.Module):
    """Takes ``SLEEP`` seconds in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(SLEEP)
        return self.linear(x)


def chain() -> nn.Sequential:
    """Its second half has next to nothing to do."""
    return nn.Sequential(Sleeping(), nn.Linear(4, 3))


def data(count: int) -> list[Batch]:
    return [(torch.randn(2, 4), torch.zeros(2, dtype=torch.long)) for _ in range(count)]


def runner_of(method: str = "fdg") -> FDGRunner:
    return FDGRunner(chain(), ["cpu", "cpu"], split=[1], method=method, lr=0.01)


@pytest.mark.parametrize("method", ["fdg", "bp"])
def test_an_epoch_knows_how_long_each_stage_was_at_work(method: str) -> None:
    (epoch,) = runner_of(method).fit(data(10)).epochs
    assert epoch.busy is not None
    slow, quick = epoch.busy
    assert slow * epoch.seconds >= 10 * SLEEP
    assert slow <= 1
    assert 0 < quick < slow


def test_stages_that_take_turns_are_busy_for_one_epoch_together() -> None:
    (epoch,) = runner_of("bp").fit(data(8)).epochs
    assert epoch.busy is not None
    assert sum(epoch.busy) <= 1


def test_each_epoch_counts_for_itself() -> None:
    runner = runner_of()
    history = runner.fit(data(6), epochs=3)
    again = runner.fit(data(6))
    for epoch in (*history.epochs, *again.epochs):
        assert epoch.busy is not None
        assert 6 * SLEEP <= epoch.busy[0] * epoch.seconds <= epoch.seconds


def test_waiting_for_the_loader_is_no_work() -> None:
    class Slow:
        def __iter__(self) -> Iterator[Batch]:
            for batch in data(4):
                time.sleep(0.03)
                yield batch

    (epoch,) = runner_of().fit(Slow()).epochs
    assert epoch.busy is not None
    assert 0.5 < epoch.data_wait <= 1
    assert epoch.data_wait == epoch.data_seconds / epoch.seconds
    assert max(epoch.busy) < 0.5


def test_segments_of_an_epoch_add_up(tmp_path: Path) -> None:
    class Pause(Callback):
        """Nothing is at work in it, nor is it training time."""

        def on_checkpoint(self, path: Path) -> None:
            time.sleep(0.05)

    (epoch,) = (
        runner_of()
        .fit(data(9), checkpoints=Checkpoints(tmp_path, every=2), callbacks=[Pause()])
        .epochs
    )
    assert epoch.busy is not None
    assert 9 * SLEEP <= epoch.busy[0] * epoch.seconds <= epoch.seconds


class Crash(Callback):
    def on_checkpoint(self, path: Path) -> None:
        raise LookupError


def test_an_epoch_that_goes_on_counts_the_segments_before(tmp_path: Path) -> None:
    with pytest.raises(LookupError):
        runner_of().fit(data(9), checkpoints=Checkpoints(tmp_path, every=6), callbacks=[Crash()])
    quiet = Crash()
    quiet.on_checkpoint = lambda path: None  # type: ignore[method-assign]
    runner = runner_of()
    history = runner.fit(
        data(9), 2, checkpoints=Checkpoints(tmp_path, every=6, resume=True), callbacks=[quiet]
    )
    for epoch in history.epochs:
        assert epoch.busy is not None
        assert 9 * SLEEP <= epoch.busy[0] * epoch.seconds <= epoch.seconds


def test_a_finished_epoch_comes_back_as_it_was(tmp_path: Path) -> None:
    once = runner_of().fit(data(4), checkpoints=Checkpoints(tmp_path))
    again = runner_of().fit(data(4), 2, checkpoints=Checkpoints(tmp_path, resume=True))
    assert again.epochs[0] == once.epochs[0]
    assert isinstance(again.epochs[0].busy, tuple)


# -- live -------------------------------------------------------------------------------------------


def test_the_running_epochs_shares_can_be_asked_for_by_any_thread() -> None:
    runner = runner_of()
    seen: list[Shares | None] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            seen.append(runner.shares)
            time.sleep(0.001)

    thread = threading.Thread(target=ask)
    thread.start()
    runner.fit(data(20))
    ended.set()
    thread.join()
    known = [shares for shares in seen if shares is not None and shares.busy is not None]
    assert known
    assert all(0 <= share <= 1 for shares in known for share in shares.busy or ())
    assert max(shares.busy[0] for shares in known if shares.busy) > 0.2


def test_shares_are_those_of_the_epoch_under_way() -> None:
    runner = runner_of()
    moments: dict[str, Shares | None] = {"before": runner.shares}

    class Look(Callback):
        def on_epoch_start(self, epoch: int) -> None:
            moments["epoch start"] = runner.shares

        def on_batch_end(self, result: BatchResult) -> None:
            moments["batch end"] = runner.shares

        def on_epoch_end(self, result: EpochResult) -> None:
            moments["epoch end"] = runner.shares

    runner.fit(data(6), callbacks=[Look()])
    moments["after"] = runner.shares
    at_work = moments.pop("batch end")
    assert at_work is not None
    assert at_work.busy is not None
    assert len(at_work.busy) == 2
    assert at_work.busy[0] > 0
    assert set(moments.values()) == {None}


def test_the_learning_rates_of_a_batch_are_those_it_entered_with() -> None:
    runner = FDGRunner(chain(), ["cpu", "cpu"], split=[1], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(runner.optimizer, 2, gamma=0.5)
    seen: list[tuple[float, ...]] = []
    runner.fit(
        data(5),
        lr_scheduler=scheduler,
        lr_step="batch",
        on_batch=lambda result: seen.append(result.learning_rates),
    )
    assert seen == [(1.0,), (1.0,), (0.5,), (0.5,), (0.25,)]


# -- the scheduler, and the arithmetic ----------------------------------------------------------------


def test_a_scheduler_counts_the_seconds_of_its_streams() -> None:
    scheduler = Scheduler("cpu", ["a", "b"])
    action = scheduler.add_action(
        code="T", stage=0, slot=0, stream=0, reads=[], writes=[], work=lambda _: time.sleep(SLEEP)
    )
    assert scheduler.busy_seconds() == [0.0, 0.0]
    scheduler.submit(scheduler.add_tick([(action, 0)]), 0)
    scheduler.synchronize()
    busy = scheduler.busy_seconds()
    assert busy is not None
    assert busy[0] >= SLEEP
    assert busy[1] == 0
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.busy_seconds()


def test_the_trace_backend_is_never_at_work() -> None:
    assert Scheduler("trace", ["a", "b", "c"]).busy_seconds() == [0.0, 0.0, 0.0]


def test_seconds_add_up() -> None:
    nothing, one, other = Spent(), Spent(2.0, 0.5, (1.0, 2.0)), Spent(1.0, 0.25, (0.5, 0.25))
    assert nothing + one == one == one + nothing
    assert one + other == Spent(3.0, 0.75, (1.5, 2.25))
    assert one + Spent(1.0, 0.0, None) == Spent(3.0, 0.5, None)
    assert nothing.shares() is None
    assert one.shares() == Shares((0.5, 1.0), 0.25)
    assert Spent(1.0, 0.0, (1.0 + 1e-9,)).shares() == Shares((1.0,))
    assert Spent(2.0, 0.5, None).shares() == Shares(None, 0.25)


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        (Shares((0.971, 0.8449)), "busy 97 84 %"),
        (Shares((0.5,), 0.034), "busy 50 %  data 3 %"),
        (Shares((0.5,), 0.01), "busy 50 %"),
        (Shares(None, 0.2), "busy -  data 20 %"),
        (Shares((0.9, 0.2, 0.3, 0.4)), "busy 90 20 30 40 %"),
        (Shares((0.9, 0.2, 0.3, 0.4, 0.6)), "busy 20 to 90 %"),
    ],
)
def test_as_text(shares: Shares, text: str) -> None:
    assert str(shares) == text


def test_one_stage_alone() -> None:
    runner = FDGRunner(chain(), ["cpu"], lr=0.01)
    (epoch,) = runner.fit(data(4)).epochs
    assert epoch.busy is not None
    assert len(epoch.busy) == 1
    assert 0 < epoch.busy[0] <= 1


def test_an_unmeasured_epoch_is_no_row_of_zeros() -> None:
    assert EpochResult(0, 1.0, None, 8, 1, seconds=2.0).busy is None
    assert EpochResult(0, 1.0, None, 8, 1, seconds=2.0, data_seconds=0.5).data_wait == 0.25
