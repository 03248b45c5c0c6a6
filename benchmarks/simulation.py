"""How long it takes to predict an epoch of a thousand stages.

    python -m benchmarks.simulation [--stages 1024] [--ticks 10000] [--rounds 3] [--quick] [--out FOLDER]

Uneven stages with slow sends, so that everything waits for something. Seconds are CPU time of the one
thread at work, Python included.
"""

from __future__ import annotations

import random
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import make_parser, parsed, settings_of
from benchmarks.harness import quartiles, write
from fdg_cuda.schedule import METHODS, Schedule
from fdg_cuda.simulation import LAYOUTS, StageTimes, simulate

GOAL = 8.0  # seconds
QUICK = {"stages": 4, "ticks": 20, "rounds": 1}


def uneven(stages: int) -> list[StageTimes]:
    """The same at every call."""
    draw = random.Random(0)
    return [StageTimes(*(draw.random() for _ in range(5))) for _ in range(stages)]


def measure(method: str, layout: str, stages: int, ticks: int, rounds: int) -> dict[str, Any]:
    """CPU seconds to simulate ``ticks`` ticks, fill and drain included."""
    schedule = Schedule(method, stages)
    times = uneven(stages)
    batches = ticks - schedule.latency
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        run = simulate(schedule, times, batches, layout=layout)
        seconds.append(time.process_time() - begin)
        assert len(run.tick_ends) == ticks
    return {"method": method, "layout": layout, "goal": GOAL, **quartiles(seconds)}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--stages", type=int, default=1024)
    parser.add_argument("--ticks", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parsed(parser, arguments)
    settings = settings_of(given, QUICK)
    rows = [measure(method, layout, **vars(settings)) for method in METHODS for layout in LAYOUTS]
    table = Table(title=f"K = {settings.stages}, {settings.ticks} ticks")
    for heading in ("method", "layout", "CPU seconds, median (quartiles)", "goal"):
        table.add_column(heading)
    for row in rows:
        spread = f"{row['median']:.2f} ({row['q1']:.2f} to {row['q3']:.2f})"
        table.add_row(row["method"], row["layout"], spread, f"at most {row['goal']}")
    console = Console()
    console.print(table)
    file = write("simulation", {"settings": vars(settings), "rows": rows}, given.out)
    console.print(f"written to {file}")


if __name__ == "__main__":
    main()
