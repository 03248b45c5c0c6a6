"""The settings of a training run, as the command line gives them. No torch."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

LONGEST_DEFAULT_WARMUP = 5  # epochs

# What --graphs may be, and what it is to the runner.
GRAPHS: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}


@dataclass(frozen=True)
class Settings:
    """What to train and how.

    ``None`` stands for a default that depends on other settings or on what is trained: see
    :meth:`completed`. ``milestones`` and ``warmup_epochs`` are in epochs; ``seed`` is that of the
    first weights and of the batches; ``threads`` are the cores that all stages share.
    """

    model: str = "resnet20"
    data: str = "digits"
    data_root: str | None = None
    download: bool = False
    devices: tuple[int | str, ...] | None = None
    method: str = "fdg"
    split: tuple[int, ...] | None = None
    beta: float = 0.5
    backward_weights: str = "stash"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    milestones: tuple[int, ...] | None = None
    lr_decay: float = 10.0
    warmup_epochs: int | None = None
    epochs: int = 20
    batch_size: int = 128
    seed: int = 0
    threads: int | None = None
    graphs: str = "auto"
    channels_last: bool | None = None
    out: str | None = None

    def completed(self, *, threads: int) -> Settings:
        """These settings, checked, with defaults filled in; ``threads`` is that of its own name.

        The learning rate falls at a half and at three quarters of the epochs, after a warm-up of
        a quarter of them but no more than LONGEST_DEFAULT_WARMUP. ``split`` and ``channels_last``
        stay None, since they depend on the model.

        Raises:
            ValueError: a number out of range. What the runner, the models or the data sets
                check is left to them.
        """
        self._check()
        devices = self.devices
        if devices is None:
            devices = ("cpu", "cpu") if cores() >= 2 else ("cpu",)
        milestones = self.milestones
        if milestones is None:
            milestones = tuple(sorted({self.epochs // 2, self.epochs * 3 // 4} - {0}))
        warmup = self.warmup_epochs
        return replace(
            self,
            devices=devices,
            milestones=milestones,
            warmup_epochs=min(LONGEST_DEFAULT_WARMUP, self.epochs // 4)
            if warmup is None
            else warmup,
            threads=threads if self.threads is None else self.threads,
            out=self.out or f"runs/{self.data}-{self.model}-{self.method}-k{len(devices)}",
        )

    def command(self) -> str:
        """The command line that trains with these settings."""
        words = ["fdg-cuda", "train"]
        for name, value in asdict(self).items():
            option = f"--{name.replace('_', '-')}"
            if name == "channels_last" and value is False:
                words.append("--no-channels-last")
            elif value is True:
                words.append(option)
            elif isinstance(value, tuple):
                # One device needs no split; no milestones is a choice to be written.
                if value or name == "milestones":
                    words += [option, ",".join(map(str, value))]
            elif value is not None and value is not False:
                words += [option, str(value)]
        return shlex.join(words)

    def _check(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("threads", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must be at least {least}; got {value}")
        if self.graphs not in GRAPHS:
            raise ValueError(f"--graphs must be one of {', '.join(GRAPHS)}; got {self.graphs}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1; got {self.seed}")
        if not self.lr_decay > 0:
            raise ValueError(
                f"--lr-decay must be above 0 (10 divides the learning rate by ten); got "
                f"{self.lr_decay}"
            )
        _check_milestones(self.milestones or ())


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_devices(text: str) -> tuple[int | str, ...]:
    """``cpu,cpu`` or ``0,1`` as devices.

    Raises:
        ValueError: an entry is empty.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ValueError(
            f"--devices takes one device per stage, separated by commas, such as cpu,cpu or 0,1; "
            f"got {text!r}"
        )
    return tuple(int(entry) if re.fullmatch(r"\d+", entry) else entry for entry in entries)


def read_split(text: str) -> tuple[int, ...] | None:
    """``auto`` (None) or ``3,7`` as layer numbers.

    Raises:
        ValueError: an entry is no whole number.
    """
    if text.strip() == "auto":
        return None
    return _read_integers(text, "--split", "auto, or the layers where stages begin, such as 3,7")


def read_milestones(text: str) -> tuple[int, ...]:
    """``10,15`` as epochs; none if ``text`` is empty.

    Raises:
        ValueError: an entry is no whole number.
    """
    return _read_integers(text, "--milestones", "numbers of epochs such as 10,15")


def _read_integers(text: str, option: str, meaning: str) -> tuple[int, ...]:
    try:
        return tuple(int(entry) for entry in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ValueError(f"{option} takes {meaning}; got {text!r}") from None


def _check_milestones(milestones: Sequence[int]) -> None:
    rising = all(a < b for a, b in itertools.pairwise(milestones))
    if not rising or any(milestone < 1 for milestone in milestones):
        raise ValueError(
            f"--milestones must be rising numbers of epochs from 1 on, such as 10,15; got "
            f"{','.join(map(str, milestones))}"
        )
