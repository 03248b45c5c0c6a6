"""The settings of a training run: one table for the command line, settings files and Python. No torch.

A setting is one field of :class:`Settings`, and its entry there is all that there is to write.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fdg_cuda.options import option, options_of
from fdg_cuda.precision import PRECISIONS
from fdg_cuda.trace_window import read_window

LONGEST_DEFAULT_WARMUP = 5  # epochs
MOST_DEFAULT_WORKERS = 4
DEFAULT_LR = 0.1

# What --graphs may be, and what it is to the runner.
GRAPHS: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}

# What --lr-schedule may be beside the classes of torch.optim.lr_scheduler.
OWN_SCHEDULES = ("milestones", "cosine", "constant")
PLATEAU = "ReduceLROnPlateau"

OWN_OPTIMIZER = "sgd"  # what --optimizer may be beside the classes of torch.optim

WHAT, SPLIT, OPTIMIZER, RUN = "What to train", "Split and method", "Optimizer", "Run"
SCHEDULE, CHECKPOINTS, VIEW = "Learning-rate schedule", "Checkpoints", "View"

# Settings that do not decide what comes out, so that a run may go on with others.
WITHOUT_EFFECT = (
    *("data_root", "download", "out", "checkpoints", "keep"),
    *("workers", "tensorboard", "trace", "log_stages"),
)


def _rising(milestones: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise((0, *milestones)))


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _window(text: str) -> bool:
    try:
        read_window(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Settings:
    """What to train and how; each field's help says what it is.

    ``None`` stands for a default that depends on other settings or on what is trained: see
    :meth:`completed`.
    """

    model: str = option(
        "resnet20",
        WHAT,
        "Network: resnet20 and the like, one of torchvision's such as resnet50, or "
        "package.module:function, which makes yours.",
    )
    data: str = option("digits", WHAT, "digits, fashion-mnist, cifar10 or cifar100.")
    data_root: str | None = option(
        None,
        WHAT,
        "Folder of the data; fashion-mnist is looked for where Debian has it, too.",
        shown="./data",
    )
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
        "Layers (or pieces) at which stages 1, 2, ... begin, such as 3,7; auto: balance measured times.",
        takes="auto, or the layers where stages begin, such as 3,7",
        auto="auto",
    )
    capture: bool = option(
        False,
        SPLIT,
        "Cut inside of layers, too, where that balances better; a split counts pieces.",
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
    optimizer: str = option(
        OWN_OPTIMIZER,
        OPTIMIZER,
        f"{OWN_OPTIMIZER} (in a fused update), or a class of torch.optim, such as AdamW.",
    )
    optimizer_args: dict[str, Any] | None = option(
        None,
        OPTIMIZER,
        "Arguments of a class of torch as JSON.",
        takes='a JSON object such as {"weight_decay": 0.01}',
    )
    lr: float | None = option(
        None, OPTIMIZER, "Learning rate.", shown=f"{DEFAULT_LR}; torch's own of a class of torch"
    )
    momentum: float = option(0.9, OPTIMIZER, f"{OWN_OPTIMIZER}: momentum.")
    weight_decay: float = option(5e-4, OPTIMIZER, f"{OWN_OPTIMIZER}: weight decay.")
    nesterov: bool = option(False, OPTIMIZER, f"{OWN_OPTIMIZER}: Nesterov momentum.")
    no_decay: tuple[str, ...] | None = option(
        None,
        OPTIMIZER,
        "Parameters without weight decay: norm, bias, or patterns of names, such as norm,bias.",
        shown="none",
        takes="norm, bias, or patterns of parameters' names, separated by commas, such as norm,bias",
    )
    clip_norm: float | None = option(
        None,
        OPTIMIZER,
        "Scale each stage's gradients down to this norm.",
        takes="a number above 0",
        allowed=_positive,
    )
    clip_value: float | None = option(
        None,
        OPTIMIZER,
        "Cut the elements of gradients to this magnitude.",
        takes="a number above 0",
        allowed=_positive,
    )
    accumulate: int = option(
        1, OPTIMIZER, "Batches per update, which takes the mean of their gradients.", least=1
    )
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
    workers: int | None = option(
        None,
        RUN,
        "Processes that make training batches ahead.",
        shown=f"0 on the CPU, up to {MOST_DEFAULT_WORKERS} on CUDA devices",
        least=0,
    )
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
    tensorboard: bool = option(
        False, VIEW, "Write curves into the folder tensorboard of --out, for TensorBoard."
    )
    trace: str | None = option(
        None,
        VIEW,
        "Record ticks A to B-1 as trace.json (Perfetto) and trace.png: A:B, such as 100:150.",
        takes="a window of ticks A:B with A below B, such as 100:150 for ticks 100 to 149",
        allowed=_window,
    )
    log_stages: int | None = option(
        None,
        VIEW,
        "Write staleness and update-to-weight ratio of every stage to stages.csv, every so many "
        "batches.",
        least=1,
    )

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
        milestones or no warm-up has none. On CUDA devices there are MOST_DEFAULT_WORKERS workers, as
        far as there are cores besides the one that enqueues; on the CPU, where they would take the
        stages' cores, none. ``split`` and ``channels_last`` stay None, since they depend on the model.

        Raises:
            ValueError: a value of the wrong type or out of range, or one that another makes
                meaningless. What the runner, the models or the data sets check is left to them.
        """
        settings = replace(self, **accepted(vars(self)))
        settings._check_method()
        settings._check_optimizer()
        settings = replace(settings, lr=settings._lr())
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
        workers = settings.workers
        if workers is None:
            on_cpu = all(str(device).startswith("cpu") for device in devices)
            workers = 0 if on_cpu else min(MOST_DEFAULT_WORKERS, cores() - 1)
        model = settings.model.replace(":", ".")
        return replace(
            settings,
            devices=devices,
            workers=workers,
            milestones=milestones,
            warmup_epochs=warmup,
            lr_step=settings.lr_step or ("batch" if own else "epoch"),
            threads=threads if settings.threads is None else settings.threads,
            out=settings.out or f"runs/{settings.data}-{model}-{settings.method}-k{len(devices)}",
        )

    def command(self) -> str:
        """The command line that trains with these settings."""
        words = ["fdg-cuda", "train"]
        for name, entry in options_of(type(self)).items():
            value = getattr(self, name)
            if name != "split" or value:  # one device has no split to be written
                words += entry.words(value)
        return shlex.join(words)

    def _lr(self) -> float:
        if self.lr is not None:
            return self.lr
        if self.optimizer == OWN_OPTIMIZER:
            return DEFAULT_LR
        from fdg_cuda.named_optimizer import default_lr

        return default_lr(self.optimizer)

    def _check_method(self) -> None:
        """As :meth:`_check_schedule`."""
        if self.method == "bp" and self.beta != options_of(type(self))["beta"].default:
            raise ValueError(
                "--beta is for delayed gradients, and would do nothing with bp; leave it out"
            )

    def _check_optimizer(self) -> None:
        """As :meth:`_check_schedule`."""
        table = options_of(type(self))
        own = self.optimizer == OWN_OPTIMIZER
        if own and self.optimizer_args:
            raise ValueError(
                f"--optimizer-args are for a class of torch.optim; {OWN_OPTIMIZER} has options of its "
                f"own, which the help names"
            )
        if "lr" in (self.optimizer_args or {}):
            raise ValueError("the learning rate is given by --lr, not in --optimizer-args")
        for name in ("momentum", "weight_decay", "nesterov"):
            if not own and getattr(self, name) != table[name].default:
                raise ValueError(
                    f"{table[name].flag} is for --optimizer {OWN_OPTIMIZER}, and would do nothing with "
                    f"{self.optimizer}; leave it out, and give what {self.optimizer} takes as "
                    f"--optimizer-args, such as '{{\"weight_decay\": 0.01}}'"
                )
        if own and self.no_decay and self.weight_decay == 0:
            raise ValueError("--no-decay would do nothing with --weight-decay 0; leave it out")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("--clip-norm and --clip-value exclude each other; give one")

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
        if self.min_lr > max(self.lr or 0.0, 0.0):  # the optimizer refuses a negative --lr
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
