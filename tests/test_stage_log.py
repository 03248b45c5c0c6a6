"""The log of stages: the oracle's staleness and updates, the same training, and files that go on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import batches, cut, even_split, mlp, same_bits
from crashes import Crash, CrashError
from torch import Tensor, nn

from fdg_cuda import (
    Callback,
    Checkpoints,
    FDGRunner,
    History,
    NonFiniteLossError,
    StageLog,
    reference,
)
from fdg_cuda.schedule import METHODS
from fdg_cuda.stage import Stage

COUNT, EPOCHS = 7, 2
Rows = list[dict[str, float]]


def rows(path: Path) -> Rows:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def fit(
    stages: int,
    *callbacks: Callback,
    epochs: int = EPOCHS,
    fit_options: dict[str, Any] | None = None,
    delays: tuple[int, int] = (0, 0),
    **options: Any,
) -> tuple[FDGRunner, History]:
    rate = {} if "optimizer" in options else {"lr": 0.05}
    runner = FDGRunner(mlp(), ["cpu"] * stages, split=even_split(8, stages), **{**rate, **options})
    runner._machine.injected_delays = delays  # type: ignore[attr-defined]
    history = runner.fit(batches(COUNT), epochs, callbacks=callbacks, **(fit_options or {}))
    return runner, history


def adamw(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


# -- the figures ----------------------------------------------------------------------------------


def of_the_oracle(
    monkeypatch: pytest.MonkeyPatch, stages: int, every: int, **options: Any
) -> list[tuple[int, int, int, float]]:
    """(step, stage, staleness, ratio) of every update that is to be logged, from the weights that
    the oracle had."""
    parts = cut(mlp(), even_split(8, stages))
    versions: dict[int, list[Tensor]] = {}  # per stage, all of the run
    keep = reference._Stage.keep

    def kept(self: Any, version: int, oldest: int) -> None:
        keep(self, version, oldest)
        stage = [id(part) for part in parts].index(id(self.module))
        flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        if version:
            versions[stage].append(flat)
        else:
            versions.setdefault(stage, [flat])

    monkeypatch.setattr(reference._Stage, "keep", kept)
    rate = {} if "optimizer" in options else {"lr": 0.05}
    result = reference.train(parts, batches(COUNT), epochs=EPOCHS, **{**rate, **options})
    accumulate = options.get("accumulate", 1)
    found: list[tuple[int, int, int, float]] = []
    update = 0
    for epoch in range(EPOCHS):
        for first in range(0, COUNT, accumulate):
            before = epoch * COUNT + first
            behind = epoch * COUNT + min(first + accumulate, COUNT)
            for stage in range(stages) if behind // every > before // every else ():
                old, new = versions[stage][update], versions[stage][update + 1]
                stale = max(
                    update - result.forward_versions[b][stage] for b in range(before, behind)
                )
                if options.get("backward_weights") == "replay":
                    stale = 0
                found.append((behind, stage, stale, float((new - old).norm() / old.norm())))
            update += 1
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_agrees_with_the_oracle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: int,
    backward_weights: str,
    accumulate: int,
) -> None:
    options = {"backward_weights": backward_weights, "accumulate": accumulate}
    check_against_the_oracle(tmp_path, monkeypatch, stages, every=3, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ddg"},
        {"method": "bp"},
        {"optimizer": adamw, "accumulate": 3},
        {"clip_norm": 0.1, "nesterov": True},
    ],
    ids=str,
)
def test_so_do_other_methods_and_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    check_against_the_oracle(tmp_path, monkeypatch, 3, every=1, **options)


def check_against_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int, every: int, **options: Any
) -> None:
    _, history = fit(stages, StageLog(tmp_path / "stages.csv", every), **options)
    expected = of_the_oracle(monkeypatch, stages, every, **options)
    found = rows(tmp_path / "stages.csv")
    assert len(found) == len(expected) >= EPOCHS * stages
    for row, (step, stage, staleness, ratio) in zip(found, expected, strict=True):
        assert (row["step"], row["stage"], row["staleness"]) == (step, stage, staleness)
        assert row["update_ratio"] == pytest.approx(ratio, rel=1e-9)
        assert (row["epoch"], row["batch"]) == ((step - 1) // COUNT + 1, (step - 1) % COUNT + 1)
        assert row["loss"] == history.batch_losses[step - 1]


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [
        (1, 1, [*range(1, 15)]),
        (5, 1, [5, 10]),
        (10, 1, [10]),
        (15, 1, []),
        (1, 2, [2, 4, 6, 7, 9, 11, 13, 14]),
        (3, 2, [4, 6, 9, 13]),
        (7, 4, [7, 14]),
    ],
)
def test_the_steps_that_are_logged(
    tmp_path: Path, every: int, accumulate: int, steps: list[int]
) -> None:
    fit(2, StageLog(tmp_path / "stages.csv", every), accumulate=accumulate)
    found = rows(tmp_path / "stages.csv")
    assert [row["step"] for row in found] == [step for step in steps for _ in range(2)]
    assert [row["stage"] for row in found] == [0, 1] * len(steps)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_once_the_pipeline_is_full_the_staleness_is_the_schedules(
    tmp_path: Path, method: str, accumulate: int
) -> None:
    runner = FDGRunner(
        mlp(), ["cpu"] * 3, split=even_split(8, 3), method=method, accumulate=accumulate, lr=0.05
    )
    runner.fit(batches(12), callbacks=[StageLog(tmp_path / "stages.csv", every=12)])
    staleness = [row["staleness"] for row in rows(tmp_path / "stages.csv")]
    assert staleness == [runner.schedule.staleness(stage) for stage in range(3)]


# -- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"backward_weights": "current"}, {"optimizer": adamw}, {"accumulate": 2}],
    ids=str,
)
def test_training_is_the_same_and_the_file_too_however_threads_interleave(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    plain, _ = fit(3, **options)
    texts = set()
    for seed in (1, 2):
        path = tmp_path / f"{seed}.csv"
        logged, _ = fit(3, StageLog(path, every=2), delays=(seed, 300), **options)
        assert same_bits(plain.state_dict(), logged.state_dict())
        texts.add(path.read_text())
    assert len(texts) == 1


def test_without_a_log_no_update_is_started_by_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    update = Stage._update

    def watched(self: Stage, source: int, copy: int, row: int, batch: int) -> None:
        started.append(batch)
        update(self, source, copy, row, batch)

    monkeypatch.setattr(Stage, "_update", watched)
    runner, _ = fit(2, StageLog(tmp_path / "stages.csv", every=100))
    assert len(started) == 2 * EPOCHS * COUNT
    started.clear()
    runner.fit(batches(COUNT))
    assert started == []


# -- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [0, 2, 5, 8, 13])
def test_a_run_that_goes_on_goes_on_with_its_rows(tmp_path: Path, crash: int) -> None:
    def run(folder: Path, after: int, *, resume: bool = False) -> str:
        log = StageLog(folder / "stages.csv", every=2)
        checkpoints = Checkpoints(folder / "checkpoints", every=3, resume=resume)
        fit(2, log, Crash(after), accumulate=2, fit_options={"checkpoints": checkpoints})
        return (folder / "stages.csv").read_text()

    expected = run(tmp_path / "unbroken", 100)
    assert len(expected.splitlines()) > 12
    with pytest.raises(CrashError):
        run(tmp_path / "broken", crash)
    with (tmp_path / "broken" / "stages.csv").open("a") as file:
        file.write("14,2,7,0,0,0.5,1.0\n1")  # behind the checkpoint, and half a line
    assert run(tmp_path / "broken", 100, resume=True) == expected


def test_another_fit_goes_on_and_another_log_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "new" / "stages.csv"
    log = StageLog(path, every=4)
    runner, _ = fit(1, log, epochs=1)
    runner.fit(batches(COUNT), callbacks=[log])
    assert [(row["step"], row["batch"]) for row in rows(path)] == [(4, 4), (8, 1), (12, 5)]
    runner.fit(batches(COUNT), callbacks=[StageLog(path, every=6)])
    assert [row["step"] for row in rows(path)] == [6]


def test_an_epoch_that_diverges_has_rows_as_far_as_it_came(tmp_path: Path) -> None:
    spoiled = batches(20)
    spoiled[16][0].fill_(torch.nan)
    log = StageLog(tmp_path / "stages.csv", every=1)
    runner = FDGRunner(mlp(batch_norm=False), ["cpu", "cpu"], split=[4], lr=0.05)
    with pytest.raises(NonFiniteLossError):
        runner.fit(spoiled, callbacks=[log])
    assert runner.history is not None
    reported = len(runner.history.batch_losses)
    steps = [row["step"] for row in rows(tmp_path / "stages.csv")]
    assert 10 < len(steps) // 2 <= reported < 17
    assert steps == [step for step in range(1, len(steps) // 2 + 1) for _ in range(2)]
    runner.fit(batches(COUNT), callbacks=[log])
    assert rows(tmp_path / "stages.csv")[-1]["step"] == reported + COUNT


def test_a_checkpoint_knows_of_no_rows_that_a_kill_would_take_away(tmp_path: Path) -> None:
    seen: list[float] = []

    class Look(Callback):
        def on_checkpoint(self, path: Path) -> None:
            seen.append(rows(tmp_path / "stages.csv")[-1]["step"])

    checkpoints = Checkpoints(tmp_path / "checkpoints", every=3)
    log = StageLog(tmp_path / "stages.csv", every=1)
    fit(2, Look(), log, fit_options={"checkpoints": checkpoints})
    assert seen == [3, 6, 7, 10, 13, 14]


def test_a_stage_without_parameters_has_no_rows(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Tanh(), *mlp())
    runner = FDGRunner(model, ["cpu", "cpu"], split=[1], lr=0.05)
    runner.fit(batches(4), callbacks=[StageLog(tmp_path / "stages.csv", every=2)])
    assert [(row["step"], row["stage"]) for row in rows(tmp_path / "stages.csv")] == [
        (2, 1),
        (4, 1),
    ]


def test_weights_of_zeros_have_a_ratio(tmp_path: Path) -> None:
    model = mlp(batch_norm=False)
    for parameter in model[:2].parameters():
        nn.init.zeros_(parameter)
    runner = FDGRunner(model, ["cpu", "cpu"], split=[2], lr=0.05)
    runner.fit(batches(1), callbacks=[StageLog(tmp_path / "stages.csv", every=1)])
    assert rows(tmp_path / "stages.csv")[0]["update_ratio"] == torch.inf


def test_the_figures_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fdg_cuda import TensorBoard

    board = TensorBoard(tmp_path / "board")
    fit(2, board, StageLog(tmp_path / "stages.csv", every=4, board=board))
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"scalars": 0})
    events.Reload()
    found = rows(tmp_path / "stages.csv")
    assert {row["step"] for row in found} == {4, 8, 12}
    for name in ("staleness", "update_ratio"):
        for stage in (0, 1):
            points = events.Scalars(f"{name}/stage_{stage}")
            wanted = [(row["step"], row[name]) for row in found if row["stage"] == stage]
            assert [point.step for point in points] == [step for step, _ in wanted]
            assert [point.value for point in points] == pytest.approx(
                [value for _, value in wanted], rel=1e-6
            )


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be 1 or more batches; got 0"):
        StageLog("stages.csv", every=0)
    with pytest.raises(TypeError, match=r"file name, such as out/stages.csv; got 3"):
        StageLog(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is a folder"):
        StageLog(tmp_path)
    logs = [StageLog(tmp_path / name) for name in ("a.csv", "b.csv")]
    with pytest.raises(ValueError, match="one fit takes one StageLog; callbacks has 2"):
        fit(1, *logs)
    assert not (tmp_path / "a.csv").exists()
