"""What the thread that feeds the stages computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from chains import Batch, batches, mlp
from os_threads import os_threads
from torch import Tensor, nn
from versions import runner_of

from fdg_cuda import BatchResult, Callback, FDGRunner
from fdg_cuda._core import end_idle_openmp_threads, openmp_threads
from fdg_cuda.cpu_threads import Feeding

pytestmark = pytest.mark.usefixtures("four_torch_threads", "seeded")


class Loader:
    """Notes how many threads it is read with; changes it at the third batch if it is told to."""

    def __init__(self, changes_to: int | None = None) -> None:
        self.threads: list[int] = []
        self._changes_to = changes_to

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(batches(4)):
            if number == 2 and self._changes_to is not None:
                torch.set_num_threads(self._changes_to)
            self.threads.append(torch.get_num_threads())
            yield batch


@pytest.mark.parametrize(
    ("cores", "left"), [(None, 1), (4, 1), (3, 2), (2, 2), (1, 2)]
)  # two stages have a thread at least
def test_a_loader_is_read_with_the_cores_that_stages_leave(cores: int | None, left: int) -> None:
    runner = FDGRunner(mlp(), ["cpu"] * 2, cpu_threads=cores)
    runner.fit(batches(2))  # which measures the cut
    for use in (runner.fit, runner.evaluate):
        loader = Loader()
        use(loader)
        # The first batch is looked at before the stages begin.
        assert loader.threads[1:] == [left] * 3
        assert torch.get_num_threads() == 4


def test_callbacks_have_all_cores() -> None:
    seen: list[int] = []

    class Look(Callback):
        def on_batch_end(self, result: BatchResult) -> None:
            seen.append(torch.get_num_threads())

    runner_of(mlp(), 2).fit(batches(4), callbacks=[Look()])
    assert seen == [4] * 4


def test_what_a_loader_sets_stays() -> None:
    runner_of(mlp(), 2).fit(Loader(changes_to=3))
    assert torch.get_num_threads() == 3


def test_a_loader_that_fails_leaves_all_cores() -> None:
    def loader() -> Iterator[Batch]:
        yield from batches(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        runner_of(mlp(), 2).fit(loader())
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("busy", [4, 1])
def test_idle_threads_end(busy: int, reads: bool) -> None:
    end_idle_openmp_threads()
    alone = os_threads()
    torch.ones(1 << 20).add_(1.0)
    assert os_threads() == alone + 3
    with Feeding(busy):
        if reads:
            torch.ones(1 << 20).add_(1.0)
    assert os_threads() == alone
    assert openmp_threads() == 4


def test_no_thread_ends_where_none_is_short_of_cores() -> None:
    torch.ones(1 << 20).add_(1.0)
    before = os_threads()
    with Feeding(0):
        torch.ones(1 << 20).add_(1.0)
    assert os_threads() == before


def test_an_interrupt_on_the_way_in_leaves_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Feeding.__enter__

    def interrupted(self: Feeding) -> None:
        known(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Feeding, "__enter__", interrupted)
    runner = FDGRunner(mlp(), ["cpu"] * 2, split=[3])
    for use in (runner.fit, runner.evaluate):
        with pytest.raises(KeyboardInterrupt):
            use(batches(2))
        assert torch.get_num_threads() == 4


class Count(nn.Module):
    """Notes how many threads there are when it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(os_threads())
        return x


def test_of_stages_that_take_turns_only_one_has_its_threads() -> None:
    counts = [Count(), Count()]
    wide = 1 << 14  # so that the activations of a batch are worth several threads
    first = nn.Sequential(counts[0], nn.Linear(6, wide), nn.Tanh(), nn.Linear(wide, 8))
    second = nn.Sequential(counts[1], nn.Linear(8, wide), nn.Tanh(), nn.Linear(wide, 4))
    model = nn.Sequential(first, second).double()
    FDGRunner(model, ["cpu"] * 2, method="bp", split=[1], lr=0.01).fit(batches(4))
    assert len(counts[0].seen) == len(counts[1].seen) == 4
    assert len(set(counts[0].seen + counts[1].seen)) == 1, (counts[0].seen, counts[1].seen)
