"""kill -9 at any moment, the same command with --resume: the files of a run nobody killed."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kills import Zygote

KILLS = 24
EVERY_WHICH_WHILE_WRITING = 4
TIMES = {"seconds", "samples_per_second", "data_wait"}  # columns that no two runs share
COMMAND = (
    *("train", "--model", "mlp", "--epochs", "6", "--batch-size", "64", "--threads", "2"),
    *("--devices", "cpu,cpu", "--split", "2", "--checkpoint-every", "7", "--keep", "2"),
)


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    with Zygote(tmp_path) as zygote:
        yield zygote


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if k not in TIMES and not k.startswith("busy")}
        for row in rows
    ]


def kill(pid: int, seconds: float, folder: Path, *, while_writing: bool) -> None:
    """After ``seconds``, or once a file is half-written behind that."""
    time.sleep(seconds)
    patience = time.monotonic() + 5
    while while_writing and time.monotonic() < patience:
        try:
            if any(not name.endswith(".safetensors") for name in os.listdir(folder)):
                break
        except FileNotFoundError:
            pass
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, signal.SIGKILL)


def test_killed_at_random_moments(zygote: Zygote, tmp_path: Path) -> None:
    begun = time.monotonic()
    assert zygote.run(*COMMAND, "--out", "unbroken") == 0, zygote.errors()
    whole = time.monotonic() - begun
    moments = random.Random(7)
    killed, runs = 0, 0
    while killed < KILLS:
        runs += 1
        out = f"run{runs}"
        folder = tmp_path / out
        ended = False
        while not ended:
            pid = zygote.start(*COMMAND, "--out", out, "--resume")
            if killed < KILLS:
                writing = killed % EVERY_WHICH_WHILE_WRITING == 0
                # Late enough that most runs get further than the one before them.
                kill(
                    pid,
                    moments.uniform(0.0, 0.6) * whole,
                    folder / "checkpoints",
                    while_writing=writing,
                )
            code = zygote.wait()
            assert code in (0, -signal.SIGKILL), zygote.errors()
            ended = code == 0
            killed += not ended
        assert metrics(folder) == metrics(tmp_path / "unbroken")
        weights = (folder / "weights.safetensors").read_bytes()
        assert weights == (tmp_path / "unbroken" / "weights.safetensors").read_bytes()
        assert len(metrics(folder)) == 6


def test_sigterm_exits_with_0_and_the_run_goes_on(zygote: Zygote, tmp_path: Path) -> None:
    pid = zygote.start(*COMMAND, "--out", "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    while not (checkpoints.is_dir() and any(checkpoints.glob("checkpoint-*.safetensors"))):
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() == 0
    said = zygote.errors()
    assert "SIGTERM: stopped before batch" in said
    assert "Checkpoints(" not in said  # that is how to go on in Python
    assert "--resume" in said
    assert zygote.run(*COMMAND, "--out", "run") == 2  # not without saying what to do with it
    assert "unfinished run" in zygote.errors()
    assert zygote.run(*COMMAND, "--out", "run", "--resume") == 0
    assert len(metrics(tmp_path / "run")) == 6


def test_another_setting_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    short = ("train", "--model", "mlp", "--epochs", "1", "--devices", "cpu", "--out", "run")
    assert zygote.run(*short) == 0
    assert zygote.run(*short, "--resume", "--lr", "0.05", "--momentum", "0.8") == 2
    assert "--lr was 0.1 and is 0.05 now; --momentum was 0.9 and is 0.8 now" in zygote.errors()
