"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from fdg_cuda import __version__
from fdg_cuda.settings import Settings, read_devices, read_milestones, read_split

if TYPE_CHECKING:
    from fdg_cuda.train import Outcome, Training

FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130

# typer shows option defaults in the help; these are the ones of a plain run.
DEFAULT = Settings()

app = typer.Typer(
    help="Train one PyTorch model split over K devices with delayed gradients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

WHAT, SPLIT, OPTIMIZER, RUN = "What to train", "Split and method", "Optimizer", "Run"


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
def train(
    model: Annotated[
        str, typer.Option(help="Network, such as resnet20 or mlp.", rich_help_panel=WHAT)
    ] = DEFAULT.model,
    data: Annotated[
        str,
        typer.Option(help="digits, fashion-mnist, cifar10 or cifar100.", rich_help_panel=WHAT),
    ] = DEFAULT.data,
    data_root: Annotated[
        str | None,
        typer.Option(help="Folder of the data.", show_default="./data", rich_help_panel=WHAT),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download missing data.", rich_help_panel=WHAT)
    ] = DEFAULT.download,
    devices: Annotated[
        str | None,
        typer.Option(
            help="One device per stage: cpu,cpu or 0,1.",
            show_default="cpu,cpu; cpu on a single core",
            rich_help_panel=SPLIT,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="fdg, ddg or bp.", rich_help_panel=SPLIT)
    ] = DEFAULT.method,
    split: Annotated[
        str,
        typer.Option(
            help="Layers at which stages 1, 2, ... begin, such as 3,7; auto: balance measured "
            "times.",
            rich_help_panel=SPLIT,
        ),
    ] = "auto",
    beta: Annotated[
        float,
        typer.Option(help="Shrinking factor of delayed gradients.", rich_help_panel=SPLIT),
    ] = DEFAULT.beta,
    backward_weights: Annotated[
        str,
        typer.Option(
            help="stash: a batch's backward uses the weights of its forward; current: those of the "
            "moment, with one weight copy; replay: likewise, and activations are computed again "
            "instead of kept.",
            rich_help_panel=SPLIT,
        ),
    ] = DEFAULT.backward_weights,
    lr: Annotated[
        float, typer.Option(help="Learning rate.", rich_help_panel=OPTIMIZER)
    ] = DEFAULT.lr,
    momentum: Annotated[
        float, typer.Option(help="Momentum.", rich_help_panel=OPTIMIZER)
    ] = DEFAULT.momentum,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay.", rich_help_panel=OPTIMIZER)
    ] = DEFAULT.weight_decay,
    nesterov: Annotated[
        bool, typer.Option("--nesterov", help="Nesterov momentum.", rich_help_panel=OPTIMIZER)
    ] = DEFAULT.nesterov,
    milestones: Annotated[
        str | None,
        typer.Option(
            help="Epochs after which the learning rate is divided, such as 10,15.",
            show_default="1/2 and 3/4 of the epochs",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    lr_decay: Annotated[
        float,
        typer.Option(help="What a milestone divides it by.", rich_help_panel=OPTIMIZER),
    ] = DEFAULT.lr_decay,
    warmup_epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs in which the learning rate grows linearly from a tenth.",
            show_default="1/4 of the epochs, at most 5",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="Epochs to train.", rich_help_panel=RUN)
    ] = DEFAULT.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Samples per batch.", rich_help_panel=RUN)
    ] = DEFAULT.batch_size,
    seed: Annotated[
        int, typer.Option(help="Seed of weights and batches.", rich_help_panel=RUN)
    ] = DEFAULT.seed,
    threads: Annotated[
        int | None,
        typer.Option(help="Cores that all stages share.", show_default="all", rich_help_panel=RUN),
    ] = None,
    graphs: Annotated[
        str,
        typer.Option(
            help="Captured CUDA graphs: auto, on (all stages, or an error) or off.",
            rich_help_panel=SPLIT,
        ),
    ] = DEFAULT.graphs,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            help="Memory layout of images.",
            show_default="on for convolutional models",
            rich_help_panel=RUN,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for the results.",
            show_default="runs/<what>-k<stages>",
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Train a model; write weights.safetensors, metrics.csv, curves.png and settings.json.

    Ctrl-C stops, and writes what there is.
    """
    with _user_errors():
        training = _prepare(
            Settings(
                model=model,
                data=data,
                data_root=data_root,
                download=download,
                devices=None if devices is None else read_devices(devices),
                method=method,
                split=read_split(split),
                beta=beta,
                backward_weights=backward_weights,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                nesterov=nesterov,
                milestones=None if milestones is None else read_milestones(milestones),
                lr_decay=lr_decay,
                warmup_epochs=warmup_epochs,
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                threads=threads,
                graphs=graphs,
                channels_last=channels_last,
                out=out,
            )
        )
    raise typer.Exit(_run(training))


@app.command()
def doctor() -> None:
    """Say what is installed, which devices can be used, and whether a tiny training works."""
    from fdg_cuda.doctor import examine

    raise typer.Exit(0 if examine() else FAILED)


def _prepare(settings: Settings) -> Training:
    from fdg_cuda.train import Training

    return Training(settings)


def _run(training: Training) -> int:
    from fdg_cuda.progress import make_console
    from fdg_cuda.report import summary_table

    console = make_console()
    try:
        outcome = training.run(console)
    except OSError as error:
        _complain(f"the results cannot be written: {error}")
        return FAILED
    console.print(summary_table(training.summary(outcome)))
    return _verdict(outcome)


def _verdict(outcome: Outcome) -> int:
    finished = f"{len(outcome.rows)} of {outcome.settings.epochs} epochs were finished"
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
    return 0


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
