"""The settings of a training run: one table for the command line, settings files and Python. No torch.

A setting is one field of :class:`Settings`, and its entry there is all that there is to write.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fdg_cuda.options import option, options_of
from fdg_cuda.precision import PRECISIONS

LONGEST_DEFAULT_WARMUP = 5  # epochs

# What --graphs may be, and what it is to the runner.
GRAPHS: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}

# What --lr-schedule may be beside the classes of torch.optim.lr_scheduler.
OWN_SCHEDULES = ("milestones", "cosine", "constant")
PLATEAU = "ReduceLROnPlateau"

WHAT, SPLIT, OPTIMIZER, RUN = "What to train", "Split and method", "Optimizer", "Run"
SCHEDULE, CHECKPOINTS = "Learning-rate schedule", "Checkpoints"

# Settings that do not decide what comes out, so that a run may go on with others.
WITHOUT_EFFECT = ("data_root", "download", "out", "checkpoints", "keep")


def _rising(milestones: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise((0, *milestones)))


@dataclass(frozen=True)
class Settings:
    """What to train and how; each field's help says what it is.

    ``None`` stands for a default that depends on other settings or on what is trained: see
    :meth:`completed`.
    """

    model: str = option("resnet20", WHAT, "Network, such as resnet20 or mlp.")
    data: str = option("digits", WHAT, "digits, fashion-mnist, cifar10 or cifar100.")
    data_root: str | None = option(None, WHAT, "Folder of the data.", shown="./data")
    download: bool = option(False, WHAT, "Download missing data.")
    devices: tuple[int | str, ...] | None = option(
        None,
        SPLIT,
        "One device per stage: cpu,cpu or 0,1.",
        shown="cpu,cpu; cpu on a single core",
        takes="one device per stage, separated by commas, such as cpu,cpu or 0,1",
    )
    method: str = option("fdg", SPLIT, "fdg, ddg or bp.")
    split: tuple[int, ...] | None = option(
        None,
        SPLIT,
        "Layers at which stages 1, 2, ... begin, such as 3,7; auto: balance measured times.",
        takes="auto, or the layers where stages begin, such as 3,7",
        auto="auto",
    )
    beta: float = option(0.5, SPLIT, "Shrinking factor of delayed gradients.")
    backward_weights: str = option(
        "stash",
        SPLIT,
        "stash: a batch's backward uses the weights of its forward; current: those of the moment, "
        "with one weight copy; replay: likewise, and activations are computed again instead of kept.",
    )
    precision: str = option(
        "float32",
        SPLIT,
        "float32; bfloat16 or float16: forwards and losses under torch.autocast.",
        choices=PRECISIONS,
    )
    lr: float = option(0.1, OPTIMIZER, "Learning rate.")
    momentum: float = option(0.9, OPTIMIZER, "Momentum.")
    weight_decay: float = option(5e-4, OPTIMIZER, "Weight decay.")
    nesterov: bool = option(False, OPTIMIZER, "Nesterov momentum.")
    lr_schedule: str = option(
        "milestones",
        SCHEDULE,
        f"{', '.join(OWN_SCHEDULES)}, or a class of torch.optim.lr_scheduler, such as StepLR.",
    )
    milestones: tuple[int, ...] | None = option(
        None,
        SCHEDULE,
        "milestones: epochs after which the learning rate is divided, such as 10,15.",
        shown="1/2 and 3/4 of the epochs",
        takes="rising numbers of epochs from 1 on, such as 10,15",
        allowed=_rising,
    )
    lr_decay: float = option(
        10.0,
        SCHEDULE,
        "What a milestone divides it by.",
        takes="a number above 0 (10 divides the learning rate by ten)",
        allowed=lambda value: value > 0,
    )
    min_lr: float = option(0.0, SCHEDULE, "cosine: learning rate at the end.", least=0)
    warmup_epochs: int | None = option(
        None,
        SCHEDULE,
        f"Epochs in which it grows linearly from a tenth ({', '.join(OWN_SCHEDULES)} only).",
        shown=f"1/4 of the epochs, at most {LONGEST_DEFAULT_WARMUP}",
        least=0,
    )
    lr_schedule_args: dict[str, Any] | None = option(
        None,
        SCHEDULE,
        "Arguments of a class of torch as JSON.",
        takes='a JSON object such as {"step_size": 30}',
    )
    lr_step: str | None = option(
        None,
        SCHEDULE,
        "How often it moves: epoch or batch.",
        shown="batch; epoch for torch's",
        choices=("epoch", "batch"),
    )
    epochs: int = option(20, RUN, "Epochs to train.", least=1)
    batch_size: int = option(128, RUN, "Samples per batch.", least=1)
    seed: int = option(
        0,
        RUN,
        "Seed of weights and batches.",
        takes="a whole number between 0 and 2**63 - 1",
        allowed=range(2**63).__contains__,
    )
    threads: int | None = option(None, RUN, "Cores that all stages share.", shown="all", least=1)
    graphs: str = option(
        "auto",
        SPLIT,
        "Captured CUDA graphs: auto, on (all stages, or an error) or off.",
        choices=tuple(GRAPHS),
    )
    channels_last: bool | None = option(
        None, RUN, "Memory layout of images.", shown="on for convolutional models"
    )
    out: str | None = option(None, RUN, "Folder for the results.", shown="runs/<what>-k<stages>")
    checkpoints: bool = option(True, CHECKPOINTS, "Write checkpoints to go on from.")
    checkpoint_every: int | None = option(
        None,
        CHECKPOINTS,
        "Batches between two of an epoch; the pipeline drains there.",
        shown="at the end of each epoch only",
        least=1,
    )
    keep: int = option(3, CHECKPOINTS, "How many are kept, besides the best.", least=1)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Settings:
        """The settings in a TOML, YAML or JSON file, or of the run that wrote a settings.json.

        Names are those of the command line's options, with ``-`` or ``_``; what the file leaves
        out has its default.

        Raises:
            ValueError: the file cannot be understood; the message names everything wrong in it.
            OSError: it cannot be read.
        """
        from fdg_cuda.settings_file import read_values

        return cls(**read_values(path, options_of(cls)))

    def completed(self, *, threads: int) -> Settings:
        """These settings, checked, with defaults filled in; ``threads`` is that of its own name.

        The learning rate falls at a half and at three quarters of the epochs, after a warm-up of
        a quarter of them but no more than LONGEST_DEFAULT_WARMUP; a schedule that knows no
        milestones or no warm-up has none. ``split`` and ``channels_last`` stay None, since they
        depend on the model.

        Raises:
            ValueError: a value of the wrong type or out of range, or one that another makes
                meaningless. What the runner, the models or the data sets check is left to them.
        """
        settings = replace(self, **accepted(vars(self)))
        settings._check_schedule()
        if settings.checkpoint_every is not None and not settings.checkpoints:
            raise ValueError("--checkpoint-every and --no-checkpoints exclude each other; give one")
        own = settings.lr_schedule in OWN_SCHEDULES
        devices = settings.devices
        if devices is None:
            devices = ("cpu", "cpu") if cores() >= 2 else ("cpu",)
        milestones = settings.milestones
        if milestones is None:
            halves = {settings.epochs // 2, settings.epochs * 3 // 4} - {0}
            milestones = tuple(sorted(halves)) if settings.lr_schedule == "milestones" else ()
        warmup = settings.warmup_epochs
        if warmup is None:
            warmup = min(LONGEST_DEFAULT_WARMUP, settings.epochs // 4) if own else 0
        return replace(
            settings,
            devices=devices,
            milestones=milestones,
            warmup_epochs=warmup,
            lr_step=settings.lr_step or ("batch" if own else "epoch"),
            threads=threads if settings.threads is None else settings.threads,
            out=settings.out
            or f"runs/{settings.data}-{settings.model}-{settings.method}-k{len(devices)}",
        )

    def command(self) -> str:
        """The command line that trains with these settings."""
        words = ["fdg-cuda", "train"]
        for name, entry in options_of(type(self)).items():
            value = getattr(self, name)
            if name != "split" or value:  # one device has no split to be written
                words += entry.words(value)
        return shlex.join(words)

    def _check_schedule(self) -> None:
        """A setting that would have no effect is a mistake."""
        table = options_of(type(self))
        for name, schedules in (
            ("milestones", ("milestones",)),
            ("lr_decay", ("milestones",)),
            ("min_lr", ("cosine",)),
            ("warmup_epochs", OWN_SCHEDULES),
        ):
            value = getattr(self, name)
            if value and value != table[name].default and self.lr_schedule not in schedules:
                raise ValueError(
                    f"{table[name].flag} is for --lr-schedule {' or '.join(schedules)}, and would "
                    f"do nothing with {self.lr_schedule}; leave it out"
                )
        if self.lr_schedule_args and self.lr_schedule in OWN_SCHEDULES:
            raise ValueError(
                f"--lr-schedule-args are for a class of torch.optim.lr_scheduler; "
                f"{self.lr_schedule} has options of its own, which the help names"
            )
        if self.min_lr > max(self.lr, 0.0):  # the optimizer refuses a negative --lr
            raise ValueError(f"--min-lr must be at most --lr, {self.lr}; got {self.min_lr}")
        if self.lr_schedule == PLATEAU and self.lr_step == "batch":
            raise ValueError(
                f"{PLATEAU} follows the test loss, which is known once per epoch; leave --lr-step out"
            )


def accepted(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of settings, by name, checked and in their own types.

    Raises:
        ValueError: of the first that is refused, under its option's name.
    """
    table = options_of(Settings)
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = table[name].accept(value)
        except ValueError as error:
            raise ValueError(f"{table[name].flag} {error}") from None
    return checked


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
