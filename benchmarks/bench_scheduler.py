"""What the scheduler itself costs: ticks of ``fdg`` whose actions do nothing.

    pytest benchmarks/bench_scheduler.py --benchmark-json FILE

``per_stage_and_tick_us`` in each result is the figure to read; goals on two cores: 10 µs with
native empty actions, 60 µs with empty Python callables (four of them per stage and tick).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fdg_cuda._core import Scheduler
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.layout import CpuLayout, Step
from fdg_cuda.program import NoWork, Program
from fdg_cuda.schedule import Schedule

TICKS = 1000


class PythonNoWork(NoWork):
    """Every action, native ones included, is a Python callable that returns at once."""

    def work(self, step: Step) -> Callable[[int], None]:  # type: ignore[override]
        return lambda batch: None


@pytest.mark.parametrize("stages", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("work", [NoWork, PythonNoWork], ids=["native", "python"])
def test_empty_actions(benchmark: BenchmarkFixture, stages: int, work: type[NoWork]) -> None:
    schedule = Schedule("fdg", stages)
    layout = CpuLayout(schedule, BackwardWeights.STASH)
    scheduler = Scheduler("cpu", layout.streams)
    program = Program(schedule, layout, scheduler, [work() for _ in range(stages)])
    ticks = TICKS if stages <= 8 else TICKS // 10

    def epoch() -> None:
        for tick in range(ticks + schedule.latency):
            program.submit(tick, ticks if tick >= ticks else None)
        scheduler.synchronize()

    benchmark.pedantic(epoch, rounds=7, warmup_rounds=1)
    scheduler.close()
    assert benchmark.stats is not None
    per_tick = benchmark.stats.stats.median / (ticks + schedule.latency)
    benchmark.extra_info["per_stage_and_tick_us"] = round(1e6 * per_tick / stages, 3)
    print(f"  {benchmark.extra_info['per_stage_and_tick_us']} us per stage and tick")
