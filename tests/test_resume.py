"""Going on from a checkpoint gives the bits of training without a break."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import CLASSES, FEATURES, batches, even_split, mlp, same_bits
from crashes import Crash, CrashError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fdg_cuda import (
    BatchResult,
    Callback,
    CheckpointError,
    Checkpoints,
    EpochResult,
    FDGRunner,
    History,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left")

EPOCHS, BATCHES, EVERY = 3, 7, 3


class Augmented(Dataset[tuple[Tensor, int]]):
    """Draws from every generator people use, for every sample."""

    def __len__(self) -> int:
        return BATCHES * 4 - 1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.full((FEATURES,), float(index), dtype=torch.float64).sin()
        x = x + torch.randn(FEATURES, dtype=torch.float64) * 0.1
        x = x * (1 + 0.1 * random.random()) + 0.1 * np.random.rand()
        return x, index % CLASSES


class Counting(Callback):
    """Has a state of its own."""

    def __init__(self) -> None:
        self.samples = 0

    def on_epoch_end(self, result: EpochResult) -> None:
        self.samples += result.samples

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


def a_run(
    folder: Path,
    *,
    stages: int = 2,
    crash: int = 10**6,
    resume: bool = False,
    make_scheduler: Callable[[Any], Any] | None = None,
    lr_step: str = "epoch",
    model: Callable[[], nn.Sequential] = mlp,
    counting: Counting | None = None,
    every: int = EVERY,
    **options: Any,
) -> tuple[FDGRunner, History]:
    """What a script does from its first line on."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    chain = model()
    if "optimizer" not in options:
        options.setdefault("lr", 0.05)
    runner = FDGRunner(chain, ["cpu"] * stages, split=even_split(len(chain), stages), **options)
    scheduler = None if make_scheduler is None else make_scheduler(runner.optimizer)
    history = runner.fit(
        DataLoader(Augmented(), batch_size=4, shuffle=True),
        EPOCHS,
        lr_scheduler=scheduler,
        lr_step=lr_step,
        callbacks=[counting or Counting(), Crash(crash)],
        checkpoints=Checkpoints(folder, every=every, resume=resume),
    )
    return runner, history


def everything(runner: FDGRunner, history: History) -> dict[str, Tensor]:
    state = runner.state_dict()
    for stage in runner.stages:
        for number, values in enumerate(stage.optimizer_state().values()):
            for key, value in values.items():
                state[f"{key} {stage.index} {number}"] = torch.as_tensor(value)
    state["losses"] = torch.tensor(history.batch_losses, dtype=torch.float64)
    state["epochs"] = torch.tensor([[e.loss, e.accuracy, e.samples] for e in history.epochs])
    return state


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"method": "ddg", "backward_weights": "current"}),
        (3, {"nesterov": True}),
        (3, {"method": "bp"}),
        (2, {"accumulate": 2, "clip_norm": 0.5, "param_groups": {"*.bias": {"weight_decay": 0}}}),
        (2, {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01)}),
    ],
)
def test_a_crash_at_any_batch_leaves_no_trace(
    tmp_path: Path, stages: int, options: dict[str, Any]
) -> None:
    expected = everything(*a_run(tmp_path / "unbroken", stages=stages, **options))
    for crash in range(0, EPOCHS * BATCHES, 2):
        folder = tmp_path / str(crash)
        with pytest.raises(CrashError):
            a_run(folder, stages=stages, crash=crash, **options)
        resumed = a_run(folder, stages=stages, resume=True, **options)
        assert same_bits(everything(*resumed), expected), f"crash behind batch {crash}"


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.NAdam])
def test_states_made_early_or_of_another_dtype_go_on(tmp_path: Path, make: Any) -> None:
    options = {"optimizer": lambda params: make(params, lr=0.01)}
    expected = everything(*a_run(tmp_path / "unbroken", **options))
    with pytest.raises(CrashError):
        a_run(tmp_path / "run", crash=12, **options)
    resumed = a_run(tmp_path / "run", resume=True, **options)
    assert same_bits(everything(*resumed), expected)


def test_crash_after_crash(tmp_path: Path) -> None:
    expected = everything(*a_run(tmp_path / "unbroken"))
    for crash in (4, 2, 1, 6, 3):
        with pytest.raises(CrashError):
            a_run(tmp_path / "run", crash=crash, resume=True)
    assert same_bits(everything(*a_run(tmp_path / "run", resume=True)), expected)


@pytest.mark.parametrize(
    ("make_scheduler", "lr_step"),
    [
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, EPOCHS * BATCHES), "batch"),
        (lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2]), "epoch"),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n), "batch"),
        (
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
                    torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
                ],
                [4],
            ),
            "batch",
        ),
    ],
)
def test_schedulers_go_on(
    tmp_path: Path,
    make_scheduler: Callable[[Any], Any],
    lr_step: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"make_scheduler": make_scheduler, "lr_step": lr_step}
    expected = everything(*a_run(tmp_path / "unbroken", **options))
    for crash in (5, 12):
        with pytest.raises(CrashError):
            a_run(tmp_path / str(crash), crash=crash, **options)
        resumed = a_run(tmp_path / str(crash), resume=True, **options)
        assert same_bits(everything(*resumed), expected)
    assert "hyper-parameters" not in caplog.text  # the schedule moved them, nobody gave others


@pytest.mark.parametrize(
    ("stages", "backward_weights"), [(1, "stash"), (2, "stash"), (3, "replay")]
)
def test_dropout_and_hidden_buffers_go_on(
    tmp_path: Path, stages: int, backward_weights: str
) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("batches", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.batches += 1
            return x * (1 + 0.01 * self.batches)

    def model() -> nn.Sequential:
        dropouts = [nn.Dropout(0.3), nn.Dropout(0.2)]
        first, *others = mlp()
        return nn.Sequential(first, dropouts[0], *others[:-1], dropouts[1], Counter(), others[-1])

    options = {"stages": stages, "backward_weights": backward_weights, "model": model}
    expected = everything(*a_run(tmp_path / "unbroken", **options))
    for crash in (5, 11):
        with pytest.raises(CrashError):
            a_run(tmp_path / str(crash), crash=crash, **options)
        resumed = a_run(tmp_path / str(crash), resume=True, **options)
        assert same_bits(everything(*resumed), expected)


def test_callbacks_have_their_state_back(tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        a_run(tmp_path, crash=2 * BATCHES)
    counting = Counting()
    a_run(tmp_path, resume=True, counting=counting)
    assert counting.samples == EPOCHS * (BATCHES * 4 - 1)


def test_a_finished_run_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    expected = everything(*a_run(tmp_path))
    assert same_bits(everything(*a_run(tmp_path, resume=True)), expected)


def test_the_measured_cut_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    def fit(resume: bool, crash: int) -> FDGRunner:
        split = None if resume else [9]  # one that no measurement would find
        runner = FDGRunner(mlp(layers=11), ["cpu", "cpu"], split=split)
        runner.fit(
            batches(5),
            2,
            callbacks=[Crash(crash)],
            checkpoints=Checkpoints(tmp_path, resume=resume),
        )
        return runner

    with pytest.raises(CrashError):
        fit(resume=False, crash=7)
    assert fit(resume=True, crash=100).split == [9]


# -- what is refused ------------------------------------------------------------------------------


def test_an_unfinished_run_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        a_run(tmp_path, crash=9)
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"unfinished run .*resume.*overwrite"):
        a_run(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_a_finished_run_is_replaced(tmp_path: Path) -> None:
    expected = everything(*a_run(tmp_path))
    assert same_bits(everything(*a_run(tmp_path)), expected)


def test_overwriting(tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        a_run(tmp_path, crash=9)
    runner = FDGRunner(mlp(), ["cpu"])
    runner.fit(batches(2), checkpoints=Checkpoints(tmp_path, overwrite=True))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-000000002.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "stages was 2 and is 3 now"),
        ({"method": "ddg"}, "method was 'fdg' and is 'ddg' now"),
        (
            {"model": lambda: mlp(batch_norm=False)},
            r"another model: (\S+ is no more; ){5}and 5 more$",
        ),
        (
            {"model": lambda: nn.Sequential(*mlp()[:-1], nn.Linear(12, CLASSES + 1).double())},
            rf"7.weight was of shape \({CLASSES}, 12\) and is of \({CLASSES + 1}, 12\) now",
        ),
        ({"model": lambda: mlp().float()}, r"0.weight was torch.float64 and is torch.float32 now"),
        ({"every": 4}, "every was 3 and is 4 now"),
        (
            {"param_groups": {"*.bias": {"weight_decay": 0.0}}},
            "0.bias was in parameter group 0 and is in 1 now.*param_groups",
        ),
        (
            {"make_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)},
            "lr_scheduler None, but this fit has StepLR",
        ),
    ],
)
def test_another_kind_of_run_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CrashError):
        a_run(tmp_path, crash=9)
    with pytest.raises(CheckpointError, match=rf"checkpoint-0000000\d\d.*{message}"):
        a_run(tmp_path, resume=True, **options)


@pytest.mark.parametrize("patterns", [("*.bias", "*.weight"), ("0.*", "0.weight")])
def test_parameters_in_other_groups_are_refused(tmp_path: Path, patterns: tuple[str, str]) -> None:
    """As many groups with the same numbers, of other parameters."""
    before, now = ({"param_groups": {pattern: {"lr": 0.5}}} for pattern in patterns)
    with pytest.raises(CrashError):
        a_run(tmp_path, crash=9, **before)
    with pytest.raises(CheckpointError, match=r"0.bias was in parameter group 1 and is in 0 now"):
        a_run(tmp_path, resume=True, **now)


@pytest.mark.parametrize("made_by", ["arguments", "factory"])
def test_hyper_parameters_given_anew_are_the_checkpoints_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, made_by: str
) -> None:
    def given(lr: float) -> dict[str, Any]:
        if made_by == "arguments":
            return {"lr": lr}
        return {"optimizer": lambda params: torch.optim.Adam(params, lr=torch.tensor(lr))}

    expected = everything(*a_run(tmp_path / "unbroken", **given(0.5)))
    with pytest.raises(CrashError):
        a_run(tmp_path / "run", crash=9, **given(0.5))
    with pytest.raises(CrashError):
        a_run(tmp_path / "run", crash=5, resume=True, **given(0.25))
    (said,) = (r.getMessage() for r in caplog.records if "hyper-parameters" in r.getMessage())
    assert "lr of parameter group 0 is 0.5, not 0.25." in said
    caplog.clear()
    resumed = a_run(tmp_path / "run", resume=True, **given(0.5))
    assert same_bits(everything(*resumed), expected)
    assert "hyper-parameters" not in caplog.text


def test_a_hyper_parameter_can_be_changed_when_training_goes_on(tmp_path: Path) -> None:
    class Changed(Callback):
        rates: list[float]

        def on_fit_start(self, start: Any) -> None:
            self.rates = []
            if start.epoch:
                runner.optimizer.param_groups[0]["lr"] = 0.25

        def on_batch_end(self, result: BatchResult) -> None:
            self.rates.append(*result.learning_rates)

    changed = Changed()
    for epochs, resume in ((1, False), (2, True)):
        runner = FDGRunner(mlp(), ["cpu"], lr=0.5)
        checkpoints = Checkpoints(tmp_path, resume=resume)
        runner.fit(batches(2), epochs, callbacks=[changed], checkpoints=checkpoints)
        assert changed.rates == [0.25 if resume else 0.5] * 2


def test_callbacks_without_a_state_come_and_go_and_others_are_refused(tmp_path: Path) -> None:
    def fit(*callbacks: Callback, epochs: int, resume: bool) -> int:
        runner = FDGRunner(mlp(), ["cpu"])
        checkpoints = Checkpoints(tmp_path, resume=resume)
        history = runner.fit(batches(2), epochs, callbacks=callbacks, checkpoints=checkpoints)
        return len(history.batch_losses)

    fit(Crash(None), Counting(), epochs=1, resume=False)
    assert fit(Counting(), epochs=2, resume=True) == 4
    assert fit(Counting(), Crash(None), epochs=3, resume=True) == 6
    with pytest.raises(
        CheckpointError, match="it was written with Counting, but this fit has none"
    ):
        fit(Crash(None), epochs=4, resume=True)


def test_a_loader_that_ends_early_is_refused(tmp_path: Path) -> None:
    def fit(count: int, resume: bool) -> None:
        runner = FDGRunner(mlp(), ["cpu"])
        runner.fit(
            batches(count),
            callbacks=[Crash(6 if not resume else 100)],
            checkpoints=Checkpoints(tmp_path, every=5, resume=resume),
        )

    with pytest.raises(CrashError):
        fit(8, resume=False)
    with pytest.raises(ValueError, match="yields 3 batches, but 5 of the epoch were trained"):
        fit(3, resume=True)


def test_a_state_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    class Unplain(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"when": {"weights": torch.zeros(3)}}

    runner = FDGRunner(mlp(), ["cpu"])
    with pytest.raises(TypeError, match=r"callback Unplain\['when'\]\['weights'\] is a Tensor"):
        runner.fit(batches(2), callbacks=[Unplain()], checkpoints=tmp_path)
    assert runner.history is not None
    assert runner.history.batch_losses == []  # it is known before the first batch


def test_numbers_of_numpy_come_back(tmp_path: Path) -> None:
    """As a schedule that computes with numpy leaves them in the optimizer's groups."""

    class Best(Callback):
        best: Any = np.bool_(True)

        def state_dict(self) -> dict[str, Any]:
            return {"best": self.best}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.best = state["best"]

    def fit(epochs: Any, resume: bool, callback: Best) -> FDGRunner:
        runner = FDGRunner(
            mlp(),
            ["cpu"] * 2,
            split=[4],
            lr=np.float32(0.5),  # type: ignore[arg-type]
            clip_norm=np.float64(1),
            weight_decay=np.int64(0),  # type: ignore[arg-type]
        )
        if not resume:
            runner.optimizer.param_groups[0]["momentum"] = np.float64(0.3)
        checkpoints = Checkpoints(tmp_path, resume=resume)
        runner.fit(batches(2), epochs, callbacks=[callback], checkpoints=checkpoints)
        return runner

    fit(np.int64(1), False, Best())
    callback = Best()
    (group,) = fit(2, True, callback).optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.3, 0)
    assert callback.best is True


def test_a_full_disk_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fdg_cuda.checkpoint import CheckpointFolder

    save, full = CheckpointFolder.save, iter([False, True, True, False, False, False])

    def sometimes(self: CheckpointFolder, *arguments: Any, **keywords: Any) -> Path:
        if next(full):
            raise OSError(28, "No space left on device")
        return save(self, *arguments, **keywords)

    told: list[str] = []

    class Told(Callback):
        def on_checkpoint(self, path: Path) -> None:
            told.append(path.name)

    monkeypatch.setattr(CheckpointFolder, "save", sometimes)
    runner = FDGRunner(mlp(), ["cpu", "cpu"], split=[4])
    history = runner.fit(batches(4), 6, callbacks=[Told()], checkpoints=tmp_path)
    assert len(history.epochs) == 6
    said = [r.getMessage() for r in caplog.records if "No space left" in r.getMessage()]
    assert len(said) == 2
    assert "the next one is another try" in said[0]
    assert told == [f"checkpoint-{4 * n:09}.safetensors" for n in (1, 4, 5, 6)]


def test_the_newest_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(*a_run(tmp_path / "unbroken"))
    with pytest.raises(CrashError):
        a_run(tmp_path / "run", crash=19)
    newest = max((tmp_path / "run").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    assert same_bits(everything(*a_run(tmp_path / "run", resume=True)), expected)
    assert newest.name in caplog.text


def test_a_runner_with_default_hyper_parameters(tmp_path: Path) -> None:
    """A default is a number of its own type, which a file cannot hold."""
    runner = FDGRunner(mlp(), ["cpu"] * 2, split=[4])
    runner.fit(batches(3), checkpoints=tmp_path)
    assert {type(runner.optimizer.param_groups[0][n]) for n in ("lr", "momentum")} == {float}
