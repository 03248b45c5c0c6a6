"""What a stage holds, and that it does not grow."""

from __future__ import annotations

import gc
import resource
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from chains import batches, even_split, mlp

from fdg_cuda import FDGRunner
from fdg_cuda.schedule import METHODS


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["stash", "current", "replay"])
def test_weight_copies_and_batches_in_flight(mode: str, method: str, stages: int) -> None:
    runner = FDGRunner(
        mlp(),
        ["cpu"] * stages,
        split=even_split(8, stages),
        method=method,
        backward_weights=mode,
    )
    held: list[int] = [0] * stages
    most: list[int] = [0] * stages
    for stage in runner.stages:
        forward, backward, k = stage._forward, stage._backward, stage.index

        def counted_forward(
            slot: int, copy: int, batch: int, forward: object = forward, k: int = k
        ) -> None:
            forward(slot, copy, batch)  # type: ignore[operator]
            held[k] += 1
            most[k] = max(most[k], held[k])

        def counted_backward(
            slot: int, copy: int, batch: int, backward: object = backward, k: int = k
        ) -> None:
            backward(slot, copy, batch)  # type: ignore[operator]
            held[k] -= 1

        stage._forward, stage._backward = counted_forward, counted_backward
    runner.fit(batches(20))
    delays = [
        {"fdg": max(1, 2 * (stages - 1 - k)), "ddg": stages - k, "bp": 1}[method]
        for k in range(stages)
    ]
    assert most == delays
    copies = [len(stage.memory.weights) for stage in runner.stages]
    assert copies == (delays if mode == "stash" else [1] * stages)
    for stage in runner.stages:
        assert all(not slot.roots and slot.input is None for slot in stage._slots)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("mode", ["stash", "replay"])
def test_memory_is_flat_over_two_thousand_ticks(mode: str) -> None:
    runner = FDGRunner(mlp(), ["cpu"] * 3, split=[2, 5], backward_weights=mode, lr=0.001)
    sizes: list[int] = []

    def look(result: object) -> None:
        if result.batch in range(400, 2000, 300):  # type: ignore[attr-defined]
            gc.collect()
            sizes.append(resident_bytes())

    data = batches(10, last=None)
    runner.fit((data[n % 10] for n in range(2000)), on_batch=look)
    # A batch's input alone is 384 bytes and its activations some 20 kB at every stage; what `fit`
    # returns about it, the only thing to stay, is some 100 bytes. The median: whatever else lives
    # in the process may take a page once, but what is kept per batch grows in every window.
    growth = [later - earlier for earlier, later in pairwise(sizes)]
    assert len(growth) == 5
    assert statistics.median(growth) < 300 * 384


def test_the_model_is_not_held_twice_after_fit() -> None:
    """The caller's parameters are views of the newest weight copy."""
    model = mlp()
    runner = FDGRunner(model, ["cpu", "cpu"], split=[4])
    runner.fit(batches())
    for stage in runner.stages:
        newest = stage.memory.weights[stage.memory.newest]
        for parameter in stage.memory.parameters:
            assert parameter.untyped_storage().data_ptr() == newest.untyped_storage().data_ptr()
