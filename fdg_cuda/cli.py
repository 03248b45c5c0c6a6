"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fdg_cuda import __version__
from fdg_cuda.cli_settings import Given, takes_settings

if TYPE_CHECKING:
    from fdg_cuda.train import Outcome, Training

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Train one PyTorch model split over K devices with delayed gradients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# What a model raises that the data do not fit.
MISFITS = (RuntimeError, ValueError, TypeError, IndexError)


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:  # before or after typer's own handling
        sys.exit(INTERRUPTED)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fdg_cuda {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Train one PyTorch model split over K devices with delayed gradients."""


@app.command()
@takes_settings
def train(given: Given) -> None:
    """Train a model; write weights.safetensors, metrics.csv, curves.png and settings.json.

    Ctrl-C and SIGTERM stop at a checkpoint, from which the same command with --resume goes on; the
    second one stops at once.
    """
    with _user_errors():
        training = _prepare(given)
    raise typer.Exit(_run(training))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder (--out) of a run of train.")],
    devices: Annotated[
        str | None,
        typer.Option(help="One device per stage: cpu,cpu or 0,1.", show_default="those of the run"),
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(help="Folder of the data.", show_default="that of the run")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="CSV file to write: label, prediction and its probability per sample."),
    ] = None,
) -> None:
    """Test the weights of a run on its test data, over its stages; write what they predict."""
    with _user_errors():
        with _loading():
            from fdg_cuda.evaluate import evaluate_run
            from fdg_cuda.progress import make_console
            from fdg_cuda.report import percent, summary_table
            from fdg_cuda.settings import accepted

        given = None if devices is None else accepted({"devices": devices})["devices"]
        evaluated = evaluate_run(run, devices=given, data_root=data_root, predictions=predictions)
        lines = {
            "model": f"{evaluated.settings.model} of {run}",
            "data": f"{evaluated.settings.data}, {evaluated.result.samples:,} test images",
            "test loss": f"{evaluated.result.loss:.6g}",
            "test accuracy": percent(evaluated.result.accuracy),
        }
        if predictions is not None:
            lines["written"] = str(predictions)
        make_console().print(summary_table(lines))


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="Network: resnet20 and the like, one of torchvision's such as resnet50, or "
            "package.module:function, which makes yours."
        ),
    ] = "resnet20",
    devices: Annotated[
        str | None,
        typer.Option(
            help="Plan for one, two, ... of these: cpu,cpu or 0,1,2.",
            show_default="the CUDA devices here, or a CPU stage per core",
        ),
    ] = None,
    hardware: Annotated[
        Path | None,
        typer.Option(help="File that describes devices that need not be here, in their place."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 128,
    image: Annotated[str, typer.Option(help="Channels, height and width.")] = "3,32,32",
    classes: Annotated[int, typer.Option(min=2, help="That the network tells apart.")] = 10,
    backward_weights: Annotated[
        str | None,
        typer.Option(help="stash, current or replay.", show_default="the best of them"),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    capture: Annotated[
        bool, typer.Option("--capture", help="Cut inside of layers, too, as train --capture does.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.png.")] = None,
) -> None:
    """Predict how fast K stages would train a model, for K = 1, 2, ...; nothing is trained."""
    with _user_errors():
        with _loading():
            from fdg_cuda.plan_command import PlanOptions, make_plan
            from fdg_cuda.plan_report import renderables, write_plan
            from fdg_cuda.progress import make_console
            from fdg_cuda.settings import accepted

        given = None if devices is None else accepted({"devices": devices})["devices"]
        options = PlanOptions(
            model,
            given,
            hardware,
            batch_size,
            image,
            classes,
            backward_weights,
            precision,
            capture,
        )
        console = make_console()
        planned = make_plan(options, console)
        for renderable in renderables(planned):
            console.print(renderable)
        if out is not None:
            files = write_plan(planned, out, shlex.join(["fdg-cuda", *sys.argv[1:]]))
            console.print(f"written: {', '.join(map(str, files))}")


@app.command()
def doctor() -> None:
    """Say what is installed, which devices can be used, and whether a tiny training works."""
    with _loading():
        from fdg_cuda.doctor import examine

    raise typer.Exit(0 if examine() else FAILED)


def _prepare(given: Given) -> Training:
    with _loading():
        from fdg_cuda.train import Training

    return Training(given.settings(), resume=given.resume, overwrite=given.overwrite)


def _run(training: Training) -> int:
    from fdg_cuda.errors import (
        CheckpointError,
        CutMemoryError,
        LoaderWorkerError,
        ModelCaptureError,
        UnfinishedRunError,
    )
    from fdg_cuda.progress import make_console
    from fdg_cuda.report import summary_table

    console = make_console()
    try:
        outcome = training.run(console)
    except UnfinishedRunError as error:
        _complain(
            f"{error.found}. Go on with it (--resume), delete them (--overwrite), or choose another "
            f"folder (--out)"
        )
        return USER_ERROR
    except (CheckpointError, ModelCaptureError, CutMemoryError) as error:
        _complain(str(error))
        return USER_ERROR
    except LoaderWorkerError as error:
        _complain(f"{error} Here: --workers, --batch-size and --resume.")
        return FAILED
    except OSError as error:
        _complain(_not_written(error, training))
        return FAILED
    except MISFITS as error:
        said = "" if "out of memory" in str(error) else training.untrained()
        if not said:
            raise
        traceback.print_exc()  # where, in a model of the user's own
        _complain(f"{said}: {error}")
        return USER_ERROR
    console.print(summary_table(training.summary(outcome)))
    return _verdict(outcome)


def _not_written(error: OSError, training: Training) -> str:
    what = error.filename or f"what belongs into {training.out}"
    message = f"{what} cannot be written: {error.strerror or error}."
    if training.resumable:
        room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        once = "there is room" if room else "it can be"
        message += f" Once {once}, the same command with --resume goes on."
    return message


def _verdict(outcome: Outcome) -> int:
    finished = f"{len(outcome.rows)} of {outcome.settings.epochs} epochs were finished"
    if outcome.status == "stopped":
        _complain(f"{outcome.message}; {finished}. Go on with: {_resuming(outcome)}", "")
        return 0
    if outcome.status == "interrupted":
        kept = "the files hold the last of them"
        if not outcome.rows:
            kept = "weights.safetensors holds what was trained until then"
        _complain(f"interrupted: {finished}; {kept}", "")
        return INTERRUPTED
    if outcome.status == "diverged":
        kept = "weights.safetensors holds the last finite weights"
        if "weights.safetensors" not in outcome.files:
            kept = "no finite weights were reached to be written"
        _complain(f"{outcome.message} {finished}; {kept}.")
        return FAILED
    if outcome.message:
        _complain(outcome.message, "")
    return 0


def _resuming(outcome: Outcome) -> str:
    return f"{outcome.settings.command()} --resume"


@contextmanager
def _loading() -> Iterator[None]:
    """Says on a terminal why nothing happens for the first seconds."""
    from rich.console import Console

    with Console().status("loading torch"):
        yield


@contextmanager
def _user_errors() -> Iterator[None]:
    """One line instead of a traceback for what a user can put right."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("interrupted before training began; no file was written", "")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        _complain(str(error) or type(error).__name__)
        raise typer.Exit(USER_ERROR) from None


def _complain(message: str, prefix: str = "error: ") -> None:
    print(f"fdg-cuda: {prefix}{' '.join(message.split())}", file=sys.stderr)
