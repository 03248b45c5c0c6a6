"""What a stage holds, and how long a step takes, for each mode of ``backward_weights``.

    python -m benchmarks.memory [--model resnet20] [--stages 4] [--batch-size 128] [--rounds 5]
                                [--quick] [--out FOLDER]

Weight bytes are those of the arrays; input bytes those of the batches a stage holds; activation bytes
those of the distinct other storages that autograd saved, at their largest, for the backwards that had
not ended yet (with ``"replay"`` those of the batch that is computed again). The snapshot is the copy of
the newest weights and the momentum that an epoch keeps, to go back to should a loss become NaN.

Seconds per step are an epoch's, divided by its ticks: fill and drain count like any other. The modes
take turns, round by round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import make_parser, parsed, settings_of
from benchmarks.harness import quartiles, write
from fdg_cuda import FDGRunner, models
from fdg_cuda.arguments import BACKWARD_WEIGHTS
from fdg_cuda.stage import Stage

QUICK = {"model": "mlp", "stages": 2, "batch_size": 2, "rounds": 2}


class Holdings:
    """Counts what one stage holds while it runs."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.bytes_of: dict[int, int] = {}  # batch -> activation bytes
        self.inputs: dict[int, int] = {}  # batch -> bytes of the stage's input
        self.most_batches = 0
        self.most_bytes = 0
        self.most_input_bytes = 0
        self._forward, self._backward = stage._forward, stage._backward
        stage._forward = self.forward  # type: ignore[method-assign]
        stage._backward = self.backward  # type: ignore[method-assign]

    def forward(self, slot: int, copy: int, batch: int) -> None:
        with self.counted(copy, batch):
            self._forward(slot, copy, batch)
        leaf = self.stage._slots[slot].input
        assert leaf is not None
        self.inputs[batch] = leaf.untyped_storage().nbytes()
        self.most_batches = max(self.most_batches, len(self.inputs))
        self.most_input_bytes = max(self.most_input_bytes, sum(self.inputs.values()))

    def backward(self, slot: int, copy: int, batch: int, row: int = 0) -> None:
        with self.counted(copy, batch, self.stage._slots[slot].input):
            self._backward(slot, copy, batch, row)
        self.bytes_of.pop(batch, None)
        del self.inputs[batch]

    @contextmanager
    def counted(self, copy: int, batch: int, leaf: Tensor | None = None) -> Iterator[None]:
        """Count what autograd saves of ``batch`` within it, besides the weights and its input."""
        known = {leaf.untyped_storage().data_ptr() for leaf in self.stage.memory.leaves[copy]}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
                self.most_bytes = max(
                    self.most_bytes, sum(self.bytes_of.values()) + sum(saved.values())
                )
            return tensor

        if leaf is None:  # the forward, which takes it in
            taken = self.stage._take_input

            def take(batch: int) -> Tensor:
                tensor: Tensor = taken(batch)
                known.add(tensor.untyped_storage().data_ptr())
                return tensor

            self.stage._take_input = take  # type: ignore[method-assign]
        else:
            known.add(leaf.untyped_storage().data_ptr())
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            if leaf is None:
                self.stage._take_input = taken  # type: ignore[method-assign]
        self.bytes_of[batch] = self.bytes_of.get(batch, 0) + sum(saved.values())


def make_runner(model: str, stages: int, mode: str) -> FDGRunner:
    torch.manual_seed(0)
    chain = models.build(model)
    n = len(chain)
    split = [n * k // stages for k in range(1, stages)]
    return FDGRunner(chain, ["cpu"] * stages, split=split, backward_weights=mode, lr=0.0)


def batches(runner: FDGRunner, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Enough for every slot to be used twice."""
    batch = (torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,)))
    return [batch] * (2 * runner.schedule.latency + 2)


def measure(model: str, stages: int, batch_size: int, mode: str) -> list[dict[str, Any]]:
    """One row per stage."""
    runner = make_runner(model, stages, mode)
    holdings = [Holdings(stage) for stage in runner.stages]
    runner.fit(batches(runner, batch_size))
    return [
        {
            "stage": stage.index,
            "delay": runner.schedule.delay(stage.index),
            "weight_copies": len(stage.memory.weights),
            "weight_bytes": stage.memory.weight_bytes,
            "batches": held.most_batches,
            "input_bytes": held.most_input_bytes,
            "activation_bytes": held.most_bytes,
            "snapshot_bytes": snapshot_bytes(stage),
        }
        for stage, held in zip(runner.stages, holdings, strict=True)
    ]


def seconds_per_step(
    model: str, stages: int, batch_size: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Per mode, over ``rounds`` epochs behind a first one that warms up."""
    runners = {mode: make_runner(model, stages, mode) for mode in BACKWARD_WEIGHTS}
    seconds: dict[str, list[float]] = {mode: [] for mode in runners}
    for turn in range(rounds + 1):
        for mode, runner in runners.items():
            data = batches(runner, batch_size)
            (epoch,) = runner.fit(data).epochs
            if turn > 0:
                seconds[mode].append(epoch.seconds / (len(data) + runner.schedule.latency))
    return {mode: quartiles(values) for mode, values in seconds.items()}


def snapshot_bytes(stage: Stage) -> int:
    snapshot = stage.snapshot()
    state = [value for each in snapshot.optimizer for value in each.values()]
    return snapshot.weights.nbytes + sum(v.nbytes for v in state if isinstance(v, Tensor))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="resnet20", choices=models.names())
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="epochs timed per mode")
    given = parsed(parser, arguments)
    settings = settings_of(given, QUICK)
    table = Table(title=f"{settings.model}, batch {settings.batch_size}, K = {settings.stages}")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "stage": lambda row: str(row["stage"]),
        "D_k": lambda row: str(row["delay"]),
        "weight copies": lambda row: str(row["weight_copies"]),
        "weights, MB": lambda row: f"{row['weight_bytes'] / 1e6:.2f}",
        "epoch's snapshot, MB": lambda row: f"{row['snapshot_bytes'] / 1e6:.2f}",
        "batches held": lambda row: str(row["batches"]),
        "their inputs, MB": lambda row: f"{row['input_bytes'] / 1e6:.1f}",
        "activations, MB": lambda row: f"{row['activation_bytes'] / 1e6:.0f}",
    }
    for heading in ("mode", *columns):
        table.add_column(heading)
    results = {}
    for mode in BACKWARD_WEIGHTS:
        results[mode] = measure(settings.model, settings.stages, settings.batch_size, mode)
        for row in results[mode]:
            table.add_row(mode, *(column(row) for column in columns.values()))
    seconds = seconds_per_step(
        settings.model, settings.stages, settings.batch_size, settings.rounds
    )
    console = Console()
    console.print(table)
    for mode, q in seconds.items():
        console.print(f"{mode}: {q['median']:.3f} seconds per step")
    file = write(
        "memory",
        {"settings": vars(settings), "rows": results, "seconds_per_step": seconds},
        given.out,
    )
    console.print(f"written to {file}")


if __name__ == "__main__":
    main()
