"""Learning-rate schedules on the command line: metrics.csv has the rates that were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import MLP, Cli, metrics

from fdg_cuda import FDGRunner

BATCHES = 6  # of 256 in the digits' 1438 training images


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ("--warmup-epochs 2 --milestones 2", [0.1 * (0.1 + 0.9 * 5 / 12), 0.0925, 0.01]),
        ("--lr-schedule cosine --lr-step epoch --min-lr 0.02", [0.1, 0.08, 0.04]),
        ("--lr-schedule StepLR --lr-schedule-args '{\"step_size\": 1}'", [0.1, 0.01, 0.001]),
        (
            "--lr-schedule ExponentialLR --lr-step batch --lr-schedule-args '{\"gamma\": 0.5}'",
            [0.1 * 0.5 ** (BATCHES * epoch - 1) for epoch in (1, 2, 3)],
        ),
    ],
)
def test_the_metrics_have_the_rate_of_each_epochs_last_batch(
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    rates: list[float],
) -> None:
    used = rates_of_batches(monkeypatch)
    assert run_cli(f"{MLP} --epochs 3 --batch-size 256 --out out {options}") == 0
    written = [float(row["lr"]) for row in metrics(tmp_path / "out")]
    assert written == pytest.approx(rates)
    assert len(used) == 3 * BATCHES
    assert written == pytest.approx(used[BATCHES - 1 :: BATCHES], rel=1e-9)


def test_a_plateau_follows_the_test_loss(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss is a tenth of the best one, so every epoch behind the first divides the rate."""
    used = rates_of_batches(monkeypatch)
    arguments = '{"patience": 0, "threshold": 0.999, "factor": 0.5}'
    options = f"--lr-schedule ReduceLROnPlateau --lr-schedule-args '{arguments}'"
    assert run_cli(f"{MLP} --epochs 4 --batch-size 256 --out out {options}") == 0
    assert [float(row["lr"]) for row in metrics(tmp_path / "out")] == [0.1, 0.1, 0.05, 0.025]
    assert used[::BATCHES] == [0.1, 0.1, 0.05, 0.025]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lr-schedule cosin", "Did you mean 'cosine'"),
        ("--lr-schedule StepLR", "needs 'step_size'"),
        ("--lr-schedule StepLR --lr-schedule-args step_size=3", "takes a JSON object such as"),
        ("--lr-schedule StepLR --warmup-epochs 1", "--warmup-epochs is for"),
        ("--lr-schedule ReduceLROnPlateau --lr-step batch", "leave --lr-step out"),
        ("--lr-step tick", "one of epoch, batch"),
        ("--min-lr 0.01", "--min-lr is for --lr-schedule cosine"),
    ],
)
def test_schedules_that_cannot_be(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: str,
    words: str,
) -> None:
    assert run_cli(f"{MLP} --out out {options}") == 2
    errors = capfd.readouterr().err
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def rates_of_batches(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates that the stages are given, batch by batch, from now on."""
    used: list[float] = []
    honest = FDGRunner.__init__

    def watched(runner: FDGRunner, *arguments: Any, **options: Any) -> None:
        honest(runner, *arguments, **options)
        hyper_row = runner.optimizer.hyper_row

        def noted(shrinks: list[int]) -> list[list[float]]:
            rows = hyper_row(shrinks)
            (row,) = rows
            used.append(row[0])
            return rows

        runner.optimizer.hyper_row = noted  # type: ignore[method-assign]

    monkeypatch.setattr(FDGRunner, "__init__", watched)
    return used
