"""The options of a command, made from the table of settings. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from fdg_cuda.options import Option, options_of
from fdg_cuda.settings import CHECKPOINTS, Settings, accepted
from fdg_cuda.settings_file import read_values


@dataclass(frozen=True)
class Given:
    """What a command line gave.

    Attributes:
        config: the file of ``--config``.
        resume: whether to go on from a checkpoint.
        overwrite: whether to replace a run of other settings, or an unfinished one.
        words: the options that stand on it, by field name, as they were read.
    """

    config: str | None
    resume: bool
    overwrite: bool
    words: dict[str, Any]

    def settings(self) -> Settings:
        """The command line's options over those of the file over the defaults.

        Raises:
            ValueError: an option or the file cannot be understood, or the file not be read.
        """
        return Settings(**{**self._in_file(), **accepted(self.words)})

    def _in_file(self) -> dict[str, Any]:
        if self.config is None:
            return {}
        try:
            return read_values(self.config, options_of(Settings))
        except FileNotFoundError:
            raise ValueError(f"--config names {self.config}, and there is no such file") from None
        except OSError as error:
            raise ValueError(
                f"--config names {self.config}, which cannot be read: {error.strerror}"
            ) from None


def takes_settings(command: Callable[[Given], None]) -> Callable[..., None]:
    """``command`` with all its options, for typer to register: those of the table, and those that no
    file holds."""
    table = options_of(Settings)

    def run(
        context: typer.Context, config: str | None, resume: bool, overwrite: bool, **values: Any
    ) -> None:
        # typer has no value for "not given": a default that is given overrides the file, too.
        words = {
            name: value
            for name, value in values.items()
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
        command(Given(config, resume, overwrite, words))

    file = typer.Option(
        "--config",
        help="File with settings (.toml, .yaml, .json; a run's settings.json repeats it); options "
        "given here come before it.",
    )
    resume = typer.Option(
        "--resume",
        help="Go on from the newest checkpoint in --out; without one, begin anew.",
        rich_help_panel=CHECKPOINTS,
    )
    overwrite = typer.Option(
        "--overwrite",
        help="Begin anew although --out holds an unfinished run, or one with other settings.",
        rich_help_panel=CHECKPOINTS,
    )
    parameters = [
        _parameter("context", typer.Context, inspect.Parameter.empty),
        _parameter("config", Annotated[str | None, file], None),
        _parameter("resume", Annotated[bool, resume], False),
        _parameter("overwrite", Annotated[bool, overwrite], False),
        *(_parameter(name, *_typed(entry)) for name, entry in table.items()),
    ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _typed(entry: Option) -> tuple[Any, Any]:
    """The annotation from which typer makes the option, and the default it shows."""
    flags = entry.flag
    if entry.kind.python is bool:
        flags += f"/--no-{flags[2:]}"  # which a file's `true` needs to be overridden
    shown: str | bool = entry.shown or entry.default is not False
    default = entry.default if entry.auto is None else entry.auto
    described = typer.Option(
        flags, help=entry.help, show_default=shown, rich_help_panel=entry.panel
    )
    return Annotated[entry.kind.python | None, described], default
