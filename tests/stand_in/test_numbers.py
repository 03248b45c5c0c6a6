"""The CUDA backend on the stand-in gives the oracle's numbers, eagerly and as graphs."""

from __future__ import annotations

import pytest
from chains import batches, compare, even_split, mlp

from fdg_cuda import FDGRunner
from fdg_cuda.schedule import METHODS

TOLERANCE = 1e-10


def stage_every_hop(runner: FDGRunner) -> None:
    runner._machine.stage_every_hop = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_agrees_with_the_oracle(
    stages: int, method: str, backward_weights: str, graphs: bool, staged: bool
) -> None:
    """BatchNorm, three epochs, a partial last batch. ``"replay"`` leaves stages without delay to be
    captured."""
    replays = backward_weights == "replay" and method != "bp" and stages > 1
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(9),
        device=0,
        prepare=stage_every_hop if staged else lambda runner: None,
        runner_options={"graphs": "auto" if graphs and replays else graphs},
        epochs=3,
        method=method,
        backward_weights=backward_weights,
        lr=0.05,
    )
    assert difference < TOLERANCE
