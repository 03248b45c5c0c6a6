"""How long a hop takes on the CPU: from a stage's send to its neighbour's use.

    pytest benchmarks/bench_hop.py --benchmark-json FILE

Two streams play ping-pong through two buffers that both use, so that each waits for the other's event
every time; a hop is half of a round trip. ``native``: the actions do nothing. ``reference``: they
hand a tensor over as stages on the CPU do, which takes the same whatever its size. ``copy``: they copy
it, each time out of memory that the other thread has just written, as stages would that shared no
memory. ``gb_per_s``: bytes handed over, each counted once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import quartiles
from fdg_cuda._core import Scheduler
from fdg_cuda.cpu_threads import set_threads_of_streams

Action = Callable[[int], None] | None

HOPS = [("native", 0), ("reference", 0)]
HOPS += [("copy", n) for n in (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)]
QUICK = [("native", 0), ("reference", 0), ("copy", 4 << 10)]
MOST_TICKS, MOST_BYTES = 1000, 2 << 30  # of a round


def by_reference() -> tuple[Action, Action]:
    up: list[Tensor | None] = [None]
    down: list[Tensor | None] = [torch.zeros(1)]

    def ping(batch: int) -> None:
        up[0], down[0] = down[0], None

    def pong(batch: int) -> None:
        down[0], up[0] = up[0], None

    return ping, pong


def by_copy(nbytes: int) -> tuple[Action, Action]:
    up, down = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def ping(batch: int) -> None:
        up.copy_(down)

    def pong(batch: int) -> None:
        down.copy_(up)

    return ping, pong


def actions(how: str, nbytes: int) -> tuple[Action, Action]:
    if how == "copy":
        return by_copy(nbytes)
    return by_reference() if how == "reference" else (None, None)


class PingPong:
    """Two streams whose actions wait for one another."""

    def __init__(self, ping: Action, pong: Action) -> None:
        self.scheduler = Scheduler("cpu", ["ping", "pong"])
        set_threads_of_streams(self.scheduler, 2, 1)
        up, down = (self.scheduler.add_buffer(name, shared=True) for name in ("up", "down"))
        numbers = [
            self.scheduler.add_action(
                code="P",
                stage=stream,
                slot=0,
                stream=stream,
                reads=[read],
                writes=[written],
                work=work,
            )
            for stream, (read, written, work) in enumerate([(down, up, ping), (up, down, pong)])
        ]
        self.tick = self.scheduler.add_tick([(number, 0) for number in numbers])

    def play(self, ticks: int) -> None:
        for tick in range(ticks):
            self.scheduler.submit(self.tick, tick)
        self.scheduler.synchronize()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize(("how", "nbytes"), QUICK if quick else HOPS)
    metafunc.parametrize("most_ticks", [20 if quick else MOST_TICKS], ids=str)


def test_hop(benchmark: BenchmarkFixture, how: str, nbytes: int, most_ticks: int) -> None:
    ticks = min(most_ticks, MOST_BYTES // (2 * nbytes)) if nbytes else most_ticks
    game = PingPong(*actions(how, nbytes))
    try:
        benchmark.pedantic(game.play, (ticks,), rounds=9, warmup_rounds=1)
    finally:
        game.scheduler.close()
    assert benchmark.stats is not None
    hops = [seconds / (2 * ticks) for seconds in benchmark.stats.stats.data]
    benchmark.extra_info.update(
        kind="hop",
        how=how,
        bytes=nbytes,
        hop_us=quartiles([1e6 * seconds for seconds in hops]),
        gb_per_s=quartiles([1e-9 * nbytes / seconds for seconds in hops]) if nbytes else None,
    )
    print(f"  {benchmark.extra_info['hop_us']['median']:.1f} us per hop")
