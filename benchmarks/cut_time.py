"""How long it takes from a model to its cut: captured, measured, cut.

    python -m benchmarks.cut_time [--rounds 3] [--quick] [--out FOLDER]

Two CPU stages; what layers cost is not remembered from round to round. The goal: below 30 seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision import models as vision

from benchmarks.arguments import make_parser, parsed
from benchmarks.harness import quartiles, write
from fdg_cuda import models
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.layer_times import anew
from fdg_cuda.machines import make_machine
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.precision import Precision
from fdg_cuda.schedule import Schedule
from fdg_cuda.staged_model import chain_of, lay_out

STAGES = 2
GOAL = 30.0


class AsModule(nn.Module):
    """A chain that hides that it is one, so that it has to be captured."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.chain:
            x = layer(x)
        return x


# A model, the batch size and the size of images.
Case = tuple[Callable[[], nn.Module], int, int]
CASES: dict[str, Case] = {
    "resnet110, 32x32, batch 128": (lambda: AsModule(models.build("resnet110")), 128, 32),
    "vit_b_16, 224x224, batch 8": (lambda: vision.vit_b_16(num_classes=10), 8, 224),
}
QUICK: dict[str, Case] = {"mlp": (lambda: AsModule(models.build("mlp")), 2, 32)}


def measure(make: Callable[[], nn.Module], batch_size: int, size: int) -> dict[str, float]:
    """Seconds of each part."""
    torch.manual_seed(0)
    model = make()
    batch = (torch.randn(batch_size, 3, size, size), torch.randint(0, 10, (batch_size,)))
    machine = make_machine(
        [torch.device("cpu")] * STAGES,
        Schedule("fdg", STAGES),
        BackwardWeights.STASH,
        rule=UpdateRule(),
        precision=Precision.FLOAT32,
        cpu_threads=None,
        graphs="auto",
    )
    begin = time.perf_counter()
    chain = chain_of(model)
    lay_out(chain, batch[0], Precision.FLOAT32)
    captured = time.perf_counter()
    with anew():
        machine.best_cut(chain, batch, cross_entropy)
    end = time.perf_counter()
    return {"capture": captured - begin, "measure and cut": end - captured, "all": end - begin}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    given = parsed(parser, arguments)
    console = Console()
    table = Table("model", "capture, s", "measure and cut, s", "all, s")
    results: dict[str, Any] = {}
    for name, case in (QUICK if given.quick else CASES).items():
        rounds = [measure(*case) for _ in range(given.rounds)]
        results[name] = {part: quartiles([r[part] for r in rounds]) for part in rounds[0]}
        table.add_row(name, *(f"{q['median']:.1f}" for q in results[name].values()))
    console.print(table)
    written = write(
        "cut_time", {"rounds": given.rounds, "goal": GOAL, "models": results}, given.out
    )
    console.print(f"written to {written}")


if __name__ == "__main__":
    main()
