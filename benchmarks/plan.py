"""How true plans are: predicted tick times beside real ones, at K = 1 and 2.

    python -m benchmarks.plan [--rounds 3] [--seconds 60] [--ticks 12] [--quick --out FOLDER]

Five models on CPU stages. A model is planned, from times measured just then, and trained with the
planned cut; the real tick is that of a traced ``fit``, without fill, drain and the ticks in which a new
fit settles. What the machine does between the one and the other falls into their ratio: so this is
repeated for a while before it is the next model's turn, and in several rounds. The goal: predicted
within 10 % of real.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision import models as vision

from benchmarks.arguments import make_parser, parsed
from benchmarks.harness import quartiles, write
from benchmarks.steps import SETTLING
from fdg_cuda import FDGRunner, models, plan

STAGES = (1, 2)
GOAL = 0.10
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]


def images(count: int, size: int, classes: int = 10) -> Callable[[], Batch]:
    def batch() -> Batch:
        x = torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last)
        return x, torch.randint(0, classes, (count,))

    return batch


def channels_last(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        return make().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    return made


class Encoder(nn.Module):
    """A small Transformer that classifies sequences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 6, 768, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


CASES = {
    "resnet20, batch 128": Case(channels_last(lambda: models.build("resnet20")), images(128, 32)),
    "wrn16-4, batch 32": Case(channels_last(lambda: models.build("wrn16-4")), images(32, 32)),
    "torchvision resnet18, 96x96, batch 32": Case(
        channels_last(lambda: vision.resnet18(num_classes=10)), images(32, 96)
    ),
    "torchvision vit_b_16, 224x224, batch 2": Case(
        lambda: vision.vit_b_16(num_classes=10), images(2, 224)
    ),
    "Transformer encoder, 64 tokens, batch 64": Case(
        Encoder, lambda: (torch.randn(64, 64, 192), torch.randint(0, 10, (64,)))
    ),
}
QUICK = {
    "mlp": Case(
        lambda: models.build("mlp", in_channels=1, image_size=8),
        lambda: (torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))),
    )
}


def predicted(case: Case) -> dict[int, tuple[float, list[int]]]:
    """Tick seconds and cut, by the number of stages."""
    torch.manual_seed(0)
    x, y = case.batch()
    planned = plan(case.make(), x, ["cpu"] * max(STAGES), target=y, backward_weights="stash")
    found = {}
    for row in planned.rows:
        assert row.choice is not None
        found[row.stages] = (row.choice.tick_seconds, list(row.choice.split))
    return found


def real(case: Case, split: list[int], ticks: int) -> float:
    """Seconds of a tick of a traced fit."""
    torch.manual_seed(0)
    batch = case.batch()
    # lr: random images teach nothing, and must not diverge
    runner = FDGRunner(case.make(), ["cpu"] * (len(split) + 1), split=split, lr=0.0)
    skipped = runner.schedule.latency + SETTLING
    data = [batch] * (skipped + ticks + 1)
    runner.fit(data[:2])
    with runner.trace(ticks=ticks, skip=skipped) as timeline:
        runner.fit(data)
    return statistics.mean(stage.seconds / timeline.ticks for stage in timeline.stages)


def measure(
    cases: dict[str, Case], rounds: int, seconds: float, ticks: int, console: Console
) -> list[dict[str, Any]]:
    seen: dict[tuple[str, int], list[tuple[float, float]]] = {}
    cuts: dict[tuple[str, int], list[int]] = {}
    for _ in track(range(rounds), "rounds", console=console):
        for name, case in cases.items():
            for _ in repeated(seconds):
                for stages, (tick, split) in predicted(case).items():
                    cuts[name, stages] = split
                    seen.setdefault((name, stages), []).append((tick, real(case, split, ticks)))
    return [
        {
            "model": name,
            "stages": stages,
            "split": cuts[name, stages],
            "predicted": quartiles([p for p, _ in pairs]),
            "real": quartiles([r for _, r in pairs]),
            "ratio": quartiles([p / r for p, r in pairs]),
            "pairs": pairs,
            "goal": GOAL,
        }
        for (name, stages), pairs in seen.items()
    ]


def repeated(seconds: float) -> Iterator[None]:
    """Once, and again until so many seconds have passed."""
    begin = time.monotonic()
    yield
    while time.monotonic() - begin < seconds:
        yield


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="a model's turn in a round, at least"
    )
    parser.add_argument("--ticks", type=int, default=12, help="traced at a time")
    given = parsed(parser, arguments)
    console = Console()
    cases, seconds = (QUICK, 0.0) if given.quick else (CASES, given.seconds)
    rows = measure(cases, given.rounds, seconds, given.ticks, console)
    table = Table("model", "K", "predicted, ms", "real, ms", "predicted / real")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["stages"]),
            f"{1e3 * row['predicted']['median']:.0f}",
            f"{1e3 * row['real']['median']:.0f}",
            f"{row['ratio']['median']:.3f} ({row['ratio']['q1']:.3f} to {row['ratio']['q3']:.3f})",
        )
    console.print(table)
    settings = {"rounds": given.rounds, "seconds": seconds, "ticks": given.ticks}
    console.print(f"written to {write('plan', {'settings': settings, 'rows': rows}, given.out)}")


if __name__ == "__main__":
    main()
