"""Optimizers on the command line: what a runner in Python does with the same, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chains import same_bits
from commands import MLP, Cli, metrics
from safetensors.torch import load_file
from torch import nn

from fdg_cuda import FDGRunner, data, models, named_optimizer, no_decay_on_norm_and_bias
from fdg_cuda.groups import no_decay
from fdg_cuda.settings import Settings

RUN = f"{MLP} --split 2 --batch-size 256 --epochs 2 --threads 2 --no-checkpoints"
ADAMW = "--optimizer AdamW --optimizer-args '{\"betas\": [0.8, 0.9]}'"


def adamw(params: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.8, 0.9))


def in_python(**options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = models.build("mlp", in_channels=1, num_classes=10, image_size=8)
    loader = data.BatchLoader(data.load("digits").train, 256, shuffle=True, seed=0)
    FDGRunner(model, ["cpu", "cpu"], split=[2], cpu_threads=2, **options).fit(loader, 2)
    return model.state_dict()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            f"{ADAMW} --no-decay norm,bias --clip-norm 0.5 --accumulate 2",
            {
                "optimizer": adamw,
                "param_groups": no_decay_on_norm_and_bias,
                "clip_norm": 0.5,
                "accumulate": 2,
            },
        ),
        (
            "--lr 0.05 --no-decay '*.0.weight' --weight-decay 0.1 --clip-value 0.01",
            {
                "param_groups": {"*.0.weight": {"weight_decay": 0.0}},
                "lr": 0.05,
                "weight_decay": 0.1,
                "clip_value": 0.01,
            },
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_options_are_those_of_a_runner_and_a_file_repeats_them(
    run_cli: Cli, tmp_path: Path, words: str, options: dict[str, Any]
) -> None:
    words = words.replace("*.0.weight", first_weight()) if "*" in words else words
    if isinstance(options.get("param_groups"), dict):
        options = {**options, "param_groups": {first_weight(): {"weight_decay": 0.0}}}
    assert run_cli(f"{RUN} {words} --lr-schedule constant --warmup-epochs 0 --out out") == 0
    trained = load_file(tmp_path / "out" / "weights.safetensors")
    assert same_bits(trained, in_python(**options))
    assert run_cli("train --config out/settings.json --out again") == 0
    assert same_bits(trained, load_file(tmp_path / "again" / "weights.safetensors"))


def first_weight() -> str:
    """A pattern that one weight of the mlp fits."""
    model = models.build("mlp", in_channels=1, num_classes=10, image_size=8)
    name = next(name for name, p in model.named_parameters() if p.ndim == 2)
    return f"*{name}"


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ("--warmup-epochs 2 --milestones 2", [1e-3 * (0.1 + 0.9 * 5 / 12), 1e-3 * 0.925, 1e-4]),
        (
            "--lr-schedule OneCycleLR --lr-step batch --lr-schedule-args "
            '\'{"max_lr": [0.01, 0.01], "total_steps": 18}\' --no-decay norm,bias',
            None,
        ),
    ],
    ids=["milestones", "one-cycle"],
)
def test_schedules_drive_a_torch_optimizer(
    run_cli: Cli, tmp_path: Path, words: str, rates: list[float] | None
) -> None:
    assert run_cli(f"{RUN} --epochs 3 --optimizer AdamW --out out {words}") == 0
    written = [float(row["lr"]) for row in metrics(tmp_path / "out")]
    if rates is not None:
        assert written == pytest.approx(rates)
    else:
        assert max(written) > 5e-3
        assert written[-1] < 1e-5


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--optimizer adam", "Did you mean 'Adam'"),
        ("--optimizer LBFGS", "needs no closure"),
        ("--optimizer Muon", "cannot be made"),
        ("--optimizer AdamW --optimizer-args '{\"beta\": 1}'", "Did you mean 'betas'"),
        ("--optimizer AdamW --optimizer-args '{\"betas\": [2, 2]}'", "Invalid beta parameter"),
        ("--optimizer AdamW --optimizer-args betas=1", "a JSON object such as"),
        ("--optimizer AdamW --momentum 0.8", "leave it out, and give what AdamW takes"),
        ("--optimizer AdamW --lr -1", "Invalid learning rate"),
        ("--optimizer-args '{\"eps\": 1}'", "are for a class of torch.optim"),
        ("--optimizer Adam --no-decay norm", "the weight decay of Adam is 0"),
        ("--optimizer Rprop --no-decay norm", "Rprop has no weight decay"),
        ("--no-decay gamma", "--no-decay: the pattern 'gamma' matches no parameter"),
        ("--no-decay norm --model mlp", "norm: no parameter of the model is one"),
        ("--no-decay ''", "such as norm,bias"),
        ("--clip-norm 1 --clip-value 1", "exclude each other"),
        ("--clip-norm 0", "above 0"),
        ("--accumulate 0", "at least 1"),
    ],
)
def test_optimizers_that_cannot_be(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: str,
    remedy: str,
) -> None:
    assert run_cli(f"{MLP} --out out {words}") == 2
    errors = capfd.readouterr().err
    assert remedy in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", named_optimizer.names()[1:])
def test_every_optimizer_that_is_named_can_be_made(name: str) -> None:
    settings = Settings(optimizer=name).completed(threads=1)
    named_optimizer.check(settings)
    model = nn.Sequential(nn.Linear(3, 3, bias=False))  # Muon takes matrices only
    runner = FDGRunner(model, ["cpu"], **named_optimizer.runner_options(settings, model))
    assert runner.optimizer.kind == name
    assert float(runner.optimizer.param_groups[0]["lr"]) == settings.lr


def test_what_norm_and_bias_are() -> None:
    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.LayerNorm(3), ScaleNorm())
    )
    names = dict(model.named_parameters())

    def found(*which: str) -> set[str]:
        rule = no_decay(model, which)
        assert callable(rule)
        return {name for name, parameter in names.items() if rule(name, parameter)}

    norm = {"1.weight", "1.bias", "2.0.weight", "2.0.bias", "2.1.scale"}
    assert found("norm") == norm
    assert found("bias") == {"0.bias", "1.bias", "2.0.bias"}
    assert found("norm", "bias") == norm | {"0.bias"} == names.keys() - {"0.weight"}
    assert found("2.*", "norm") == norm
    assert found("0.w*") == {"0.weight"}
