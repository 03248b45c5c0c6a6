"""What a stage holds: weight copies and the activations of the batches in flight.

    python -m benchmarks.memory [--model resnet20] [--stages 4] [--batch-size 128]

Weight bytes are those of the arrays; activation bytes those of the distinct storages that autograd
saved for the backwards that had not run yet, at their largest (weights and inputs of the stage
excluded). The snapshot is the copy of the newest weights and the momentum that an epoch keeps, to go
back to should a loss become NaN.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import write
from fdg_cuda import FDGRunner, models
from fdg_cuda.stage import Stage


class Holdings:
    """Counts what one stage holds while it runs."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.bytes_of: dict[int, int] = {}  # batch -> activation bytes
        self.most_batches = 0
        self.most_bytes = 0
        self._forward, self._backward = stage._forward, stage._backward
        stage._forward = self.forward  # type: ignore[method-assign]
        stage._backward = self.backward  # type: ignore[method-assign]

    def forward(self, slot: int, copy: int, batch: int) -> None:
        weights = {leaf.untyped_storage().data_ptr() for leaf in self.stage.memory.leaves[copy]}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._forward(slot, copy, batch)
        self.bytes_of[batch] = sum(saved.values())
        self.most_batches = max(self.most_batches, len(self.bytes_of))
        self.most_bytes = max(self.most_bytes, sum(self.bytes_of.values()))

    def backward(self, slot: int, copy: int, batch: int, row: int = 0) -> None:
        self._backward(slot, copy, batch, row)
        del self.bytes_of[batch]


def measure(model: str, stages: int, batch_size: int, mode: str) -> list[dict[str, Any]]:
    """One row per stage."""
    torch.manual_seed(0)
    chain = models.build(model)
    n = len(chain)
    runner = FDGRunner(
        chain,
        ["cpu"] * stages,
        split=[n * k // stages for k in range(1, stages)],
        backward_weights=mode,
    )
    batch = (torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,)))
    holdings = [Holdings(stage) for stage in runner.stages]
    runner.fit([batch] * (2 * runner.schedule.latency + 2))
    return [
        {
            "stage": stage.index,
            "delay": runner.schedule.delay(stage.index),
            "weight_copies": len(stage.memory.weights),
            "weight_bytes": stage.memory.weight_bytes,
            "batches": held.most_batches,
            "activation_bytes": held.most_bytes,
            "snapshot_bytes": snapshot_bytes(stage),
        }
        for stage, held in zip(runner.stages, holdings, strict=True)
    ]


def snapshot_bytes(stage: Stage) -> int:
    snapshot = stage.snapshot()
    state = [value for each in snapshot.optimizer for value in each.values()]
    return snapshot.weights.nbytes + sum(v.nbytes for v in state if isinstance(v, Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="resnet20", choices=models.names())
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    settings = parser.parse_args()
    table = Table(title=f"{settings.model}, batch {settings.batch_size}, K = {settings.stages}")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "stage": lambda row: str(row["stage"]),
        "D_k": lambda row: str(row["delay"]),
        "weight copies": lambda row: str(row["weight_copies"]),
        "weights, MB": lambda row: f"{row['weight_bytes'] / 1e6:.2f}",
        "epoch's snapshot, MB": lambda row: f"{row['snapshot_bytes'] / 1e6:.2f}",
        "batches held": lambda row: str(row["batches"]),
        "activations, MB": lambda row: f"{row['activation_bytes'] / 1e6:.0f}",
    }
    for heading in ("mode", *columns):
        table.add_column(heading)
    results = {}
    for mode in ("stash", "current"):
        results[mode] = measure(settings.model, settings.stages, settings.batch_size, mode)
        for row in results[mode]:
            table.add_row(mode, *(column(row) for column in columns.values()))
    console = Console()
    console.print(table)
    console.print(f"written to {write('memory', {'settings': vars(settings), 'rows': results})}")


if __name__ == "__main__":
    main()
