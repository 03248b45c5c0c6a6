"""20,000 ticks of a small model with random delays: nothing grows, nothing is left."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from chains import Batch, even_split, mlp

from fdg_cuda import FDGRunner

TICKS, STAGES = 20_000, 3
SETTLED = 5_000  # ticks in which allocators take what they keep
MOST_GROWTH_BYTES = 8 << 20  # 420 bytes a tick would show


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


class Endless:
    """``count`` batches, made one by one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            yield x, x.abs().argmax(dim=1) % 4


@pytest.mark.usefixtures("one_torch_thread", "no_thread_left")
def test_20000_ticks() -> None:
    model = mlp(batch_norm=False, layers=4)
    runner = FDGRunner(
        model, ["cpu"] * STAGES, split=even_split(len(model), STAGES), lr=0.001, momentum=0.0
    )
    runner._machine.injected_delays = (1, 20)
    runner.fit(Endless(20))
    before, sizes = descriptors(), {}

    def look(result: object) -> None:
        number = len(sizes)
        sizes[number] = resident_bytes() if number % 100 == 0 else 0

    gc.collect()
    history = runner.fit(Endless(TICKS), on_batch=look)
    assert len(history.batch_losses) == TICKS
    late = [size for number, size in sizes.items() if number >= SETTLED and size]
    assert max(late) - late[0] < MOST_GROWTH_BYTES, f"{late[0]:,} bytes grew to {max(late):,}"
    assert descriptors() == before
