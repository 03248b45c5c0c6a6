"""The table of settings: values, their words on a command line, and what makes no sense together."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from fdg_cuda.options import options_of
from fdg_cuda.settings import OWN_SCHEDULES, Settings

TABLE = options_of(Settings)
SET = {
    "data_root": "somewhere",
    "devices": (0, "cpu:1"),
    "split": (3,),
    "optimizer_args": {"betas": [0.8, 0.9]},
    "lr": 1e-5,
    "no_decay": ("norm", "*.bias"),
    "clip_norm": 0.5,
    "clip_value": 1e-3,
    "milestones": (2, 5),
    "warmup_epochs": 0,
    "lr_schedule_args": {"gamma": 0.5, "a": [1, None]},
    "lr_step": "batch",
    "threads": 3,
    "channels_last": False,
    "out": "a b",
    "checkpoint_every": 50,
    "workers": 2,
    "trace": "100:150",
    "log_stages": 10,
}


@pytest.mark.parametrize(
    ("epochs", "warmup", "milestones"),
    [(1, 0, ()), (2, 0, (1,)), (4, 1, (2, 3)), (20, 5, (10, 15)), (300, 5, (150, 225))],
)
def test_defaults_follow_the_number_of_epochs(
    epochs: int, warmup: int, milestones: tuple[int, ...]
) -> None:
    settings = Settings(epochs=epochs).completed(threads=3)
    assert settings.warmup_epochs == warmup
    assert settings.milestones == milestones
    assert settings.threads == 3


def test_every_schedule_has_the_defaults_it_knows() -> None:
    whole = {name: Settings(lr_schedule=name).completed(threads=1) for name in OWN_SCHEDULES}
    assert [s.milestones for s in whole.values()] == [(10, 15), (), ()]
    assert {s.warmup_epochs for s in whole.values()} == {5}
    assert {s.lr_step for s in whole.values()} == {"batch"}
    step = Settings(lr_schedule="StepLR", lr_schedule_args={"step_size": 1}).completed(threads=1)
    assert (step.milestones, step.warmup_epochs, step.lr_step) == ((), 0, "epoch")
    assert step.completed(threads=9) == step, "completed settings are complete"


def test_every_optional_setting_is_in_this_file() -> None:
    assert SET.keys() == {name for name, entry in TABLE.items() if entry.optional}


@pytest.mark.parametrize("settings", [Settings(), Settings(**SET, nesterov=True)])
def test_the_command_of_settings_gives_these_settings(settings: Settings) -> None:
    words = shlex.split(settings.command())
    assert words[:2] == ["fdg-cuda", "train"]
    read: dict[str, Any] = {}
    position = 2
    while position < len(words):
        flag = words[position]
        value: Any = not flag.startswith("--no-")
        name = flag.removeprefix("--").replace("-", "_")
        name = name if name in TABLE else name.removeprefix("no_")
        position += 1
        entry = TABLE[name]
        if entry.kind.python is not bool:
            value = entry.kind.python(words[position])
            position += 1
        read[name] = entry.accept(value)
    assert Settings(**read) == settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": "4"}, "--epochs takes a whole number of at least 1; got '4'"),
        ({"epochs": True}, "--epochs takes a whole number of at least 1; got true"),
        ({"epochs": None}, "--epochs takes a whole number of at least 1; got null"),
        ({"lr_decay": float("nan")}, "--lr-decay takes a number above 0"),
        ({"lr": 10**400}, "--lr takes a number; got 1000"),
        ({"lr": "0.1"}, "--lr takes a number; got '0.1'"),
        ({"nesterov": 1}, "--nesterov takes true or false; got 1"),
        ({"graphs": "maybe"}, "--graphs takes one of auto, on, off; got 'maybe'"),
        ({"lr_step": "tick"}, "--lr-step takes one of epoch, batch; got 'tick'"),
        ({"milestones": (3, 3)}, "--milestones takes rising .*got \\[3, 3\\]"),
        ({"devices": ()}, "--devices takes one device per stage.*got \\[\\]"),
        ({"devices": ("cpu", 1.5)}, "--devices takes"),
        ({"split": "1,,2"}, "--split takes auto, or"),
        ({"no_decay": "norm,,bias"}, "--no-decay takes norm, bias, or patterns"),
        ({"no_decay": ()}, "--no-decay takes norm, bias, or patterns"),
        ({"no_decay": (3,)}, "--no-decay takes norm, bias, or patterns"),
        ({"clip_norm": 0.0}, "--clip-norm takes a number above 0; got 0.0"),
        ({"clip_value": float("inf")}, "--clip-value takes a number above 0"),
        ({"accumulate": 0}, "--accumulate takes a whole number of at least 1; got 0"),
        ({"optimizer_args": "[1]"}, "--optimizer-args takes a JSON object such as"),
        ({"log_stages": 0}, "--log-stages takes a whole number of at least 1; got 0"),
        ({"trace": "150:100"}, "--trace takes a window of ticks A:B .*got '150:100'"),
        ({"trace": "100"}, "--trace takes a window of ticks A:B .*got '100'"),
        ({"seed": 2**63}, "--seed takes"),
        ({"lr_schedule_args": {1: 2}}, "--lr-schedule-args takes a JSON object"),
        ({"lr_schedule_args": "[1]"}, "--lr-schedule-args takes a JSON object"),
        ({"lr_schedule_args": {"gamma": float("inf"), "b": {1}}}, "--lr-schedule-args takes"),
    ],
)
def test_values_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        Settings(**given).completed(threads=1)


def test_lists_become_tuples_and_whole_numbers_numbers() -> None:
    given: dict[str, Any] = {"milestones": [2, 4], "devices": ["cpu", 0], "lr": 1}
    settings = Settings(**given).completed(threads=1)
    assert (settings.milestones, settings.devices) == ((2, 4), ("cpu", 0))
    assert isinstance(settings.lr, float)


STEP = {"lr_schedule": "StepLR"}
COSINE = {"lr_schedule": "cosine"}
ADAMW = {"optimizer": "AdamW"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({**STEP, "warmup_epochs": 1}, "--warmup-epochs is for --lr-schedule milestones or cosine"),
        ({**STEP, "min_lr": 0.01}, "--min-lr is for --lr-schedule cosine"),
        ({**COSINE, "milestones": (3,)}, "--milestones is for --lr-schedule milestones"),
        ({**COSINE, "lr_decay": 2.0}, "--lr-decay is for --lr-schedule milestones"),
        ({**COSINE, "lr_schedule_args": {"a": 1}}, "--lr-schedule-args are for a class"),
        ({**COSINE, "min_lr": 0.2}, "--min-lr must be at most --lr, 0.1; got 0.2"),
        ({"lr_schedule": "ReduceLROnPlateau", "lr_step": "batch"}, "leave --lr-step out"),
        ({"optimizer_args": {"eps": 1.0}}, "--optimizer-args are for a class of torch.optim; sgd"),
        ({**ADAMW, "optimizer_args": {"lr": 0.1}}, "given by --lr, not in --optimizer-args"),
        ({**ADAMW, "momentum": 0.5}, "--momentum is for --optimizer sgd, .* with AdamW; leave"),
        ({**ADAMW, "weight_decay": 0.1}, "--weight-decay is for --optimizer sgd.*--optimizer-args"),
        ({**ADAMW, "nesterov": True}, "--nesterov is for --optimizer sgd"),
        ({**ADAMW, **COSINE, "min_lr": 0.01}, "--min-lr must be at most --lr, 0.001; got 0.01"),
        ({"no_decay": ("norm",), "weight_decay": 0.0}, "--no-decay would do nothing"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "--clip-norm and --clip-value exclude each other"),
        ({"method": "bp", "beta": 0.3}, "--beta is .*would do nothing with bp; leave it out"),
        ({"optimizer": "adamw"}, "Unknown optimizer 'adamw'. Did you mean 'AdamW'"),
    ],
)
def test_settings_that_would_do_nothing(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**given).completed(threads=1)


@pytest.mark.parametrize(
    ("given", "lr"),
    [({}, 0.1), (ADAMW, 1e-3), ({"optimizer": "Adadelta"}, 1.0), ({**ADAMW, "lr": 0.5}, 0.5)],
)
def test_the_learning_rate_is_by_default_the_optimizers(given: dict[str, Any], lr: float) -> None:
    completed = Settings(**given).completed(threads=1)
    assert completed.lr == lr
    assert completed.completed(threads=1) == completed
