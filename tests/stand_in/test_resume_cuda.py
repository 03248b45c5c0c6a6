"""Going on from a checkpoint on CUDA devices gives the bits of training without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chains import batches, even_split, mlp, same_bits
from crashes import Crash, CrashError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fdg_cuda import Checkpoints, FDGRunner

EPOCHS, BATCHES, EVERY = 2, 5, 2


def a_run(
    folder: Path,
    stages: int,
    *,
    crash: int | None = None,
    resume: bool = False,
    seed: int = 3,
    **options: Any,
) -> tuple[dict[str, Tensor], int]:
    """What a script does from its first line on: everything it trained, and in how many batches."""
    x, y = batches(1, size=8 * BATCHES - 3, last=None)[0]
    layers = [layer for each in mlp(layers=5) for layer in (each, nn.Dropout(0.3))][:-1]
    torch.manual_seed(seed)
    runner = FDGRunner(
        nn.Sequential(*layers), list(range(stages)), split=even_split(9, stages), **options
    )
    callback = Crash(crash)
    history = runner.fit(
        DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
        EPOCHS,
        callbacks=[callback],
        checkpoints=Checkpoints(folder, every=EVERY, resume=resume),
    )
    state = runner.state_dict()
    for stage in runner.stages:
        for number, values in enumerate(stage.optimizer_state().values()):
            for key, value in values.items():
                state[f"{key} {stage.index} {number}"] = torch.as_tensor(value)
    state["losses"] = torch.tensor(history.batch_losses, dtype=torch.float64)
    return state, callback.seen


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05, "graphs": False},
        {"lr": 0.05, "graphs": True},
        {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.01)},
    ],
    ids=["eager", "graphs", "AdamW"],
)
@pytest.mark.parametrize("stages", [1, 2])
def test_a_crash_leaves_no_trace(tmp_path: Path, stages: int, options: dict[str, Any]) -> None:
    """Dropout, BatchNorm, a shuffled loader. Checkpoints lie behind batches 2, 4 and 5 of an epoch."""
    expected, trained = a_run(tmp_path / "unbroken", stages, **options)
    assert trained == EPOCHS * BATCHES
    for crash, kept in ((3, 2), (6, 5)):
        folder = tmp_path / str(crash)
        with pytest.raises(CrashError):
            a_run(folder, stages, crash=crash, **options)
        # Random numbers are the checkpoint's, whatever the script seeds.
        found, trained = a_run(folder, stages, resume=True, seed=4, **options)
        assert trained == EPOCHS * BATCHES - kept
        assert same_bits(found, expected), f"crash behind batch {crash}"
