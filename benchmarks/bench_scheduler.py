"""What the scheduler itself costs: ticks of ``fdg`` whose actions do nothing, K = 1 to 64.

    pytest benchmarks/bench_scheduler.py --benchmark-json FILE

``per_stage_and_tick_us`` in each result is the figure to read; goals on two cores: 10 µs with
native empty actions, 60 µs with empty Python callables (four of them per stage and tick).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import quartiles
from fdg_cuda._core import Scheduler
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.layout import CpuLayout, Step
from fdg_cuda.program import NoWork, Program
from fdg_cuda.schedule import Schedule

STAGES = (1, 2, 4, 8, 16, 32, 64)
TICKS = 1000
GOALS_US = {"native": 10.0, "python": 60.0}


class PythonNoWork(NoWork):
    """Every action, native ones included, is a Python callable that returns at once."""

    def work(self, step: Step) -> Callable[[int], None]:  # type: ignore[override]
        return lambda batch: None


WORKS: dict[str, type[NoWork]] = {"native": NoWork, "python": PythonNoWork}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    metafunc.parametrize("stages", (1, 4) if quick else STAGES)
    metafunc.parametrize("ticks", (10 if quick else TICKS,), ids=str)
    metafunc.parametrize("work", WORKS)


def test_empty_actions(benchmark: BenchmarkFixture, stages: int, ticks: int, work: str) -> None:
    schedule = Schedule("fdg", stages)
    layout = CpuLayout(schedule, BackwardWeights.STASH)
    scheduler = Scheduler("cpu", layout.streams)
    program = Program(schedule, layout, scheduler, [WORKS[work]() for _ in range(stages)])

    def epoch() -> None:
        for tick in range(ticks + schedule.latency):
            program.submit(tick, ticks if tick >= ticks else None)
        scheduler.synchronize()

    benchmark.pedantic(epoch, rounds=7, warmup_rounds=1)
    scheduler.close()
    assert benchmark.stats is not None
    # Fill and drain included, in which a stage does nothing half of the time: it has `ticks` of work.
    times = 1e6 / (ticks * stages)
    per_tick = quartiles([times * seconds for seconds in benchmark.stats.stats.data])
    benchmark.extra_info.update(
        kind="scheduler",
        stages=stages,
        work=work,
        per_stage_and_tick_us=per_tick,
        goal=GOALS_US[work],
    )
    print(f"  {per_tick['median']:.3f} us per stage and tick")
