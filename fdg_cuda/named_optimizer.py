"""The optimizer that settings name: what a runner takes for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fdg_cuda.groups import no_decay
from fdg_cuda.names import check_keywords, did_you_mean
from fdg_cuda.settings import OWN_OPTIMIZER, Settings

# Known to torch, but no stage can step them; a runner says why.
UNUSABLE = ("LBFGS", "SparseAdam")


def names() -> tuple[str, ...]:
    """What ``--optimizer`` may be."""
    return (OWN_OPTIMIZER, *(name for name in _classes() if name not in UNUSABLE))


def default_lr(name: str) -> float:
    """Of a class of torch.

    Raises:
        ValueError: there is no such optimizer.
    """
    return float(inspect.signature(_class_of(name)).parameters["lr"].default)


def check(settings: Settings) -> None:
    """What can be said of completed settings before there is a model.

    Raises:
        ValueError: no such optimizer, arguments it does not take, or a setting that would do nothing.
    """
    if settings.optimizer == OWN_OPTIMIZER:
        return
    made, arguments = _class_of(settings.optimizer), settings.optimizer_args or {}
    check_keywords("--optimizer-args", made, arguments, ("params", "lr"))
    if settings.no_decay:
        parameter = inspect.signature(made).parameters.get("weight_decay")
        if parameter is None:
            raise ValueError(
                f"--no-decay would do nothing: {settings.optimizer} has no weight decay; leave it out"
            )
        if not arguments.get("weight_decay", parameter.default):
            raise ValueError(
                f"--no-decay would do nothing: the weight decay of {settings.optimizer} is 0; give "
                f"--optimizer-args, such as '{{\"weight_decay\": 0.01}}', or leave it out"
            )


def runner_options(settings: Settings, model: nn.Module) -> dict[str, Any]:
    """The arguments of :class:`~fdg_cuda.FDGRunner` that decide how ``model`` is updated.

    Args:
        settings: completed and checked ones.

    Raises:
        ValueError: ``--no-decay`` finds no parameter in ``model``.
    """
    options: dict[str, Any] = {
        "beta": settings.beta,
        "accumulate": settings.accumulate,
        "clip_norm": settings.clip_norm,
        "clip_value": settings.clip_value,
    }
    if settings.no_decay:
        try:
            options["param_groups"] = no_decay(model, settings.no_decay)
        except ValueError as error:
            raise ValueError(f"--no-decay: {error}") from None
    if settings.optimizer == OWN_OPTIMIZER:
        return {
            **options,
            "lr": settings.lr,
            "momentum": settings.momentum,
            "weight_decay": settings.weight_decay,
            "nesterov": settings.nesterov,
        }
    made = _class_of(settings.optimizer)
    arguments = {
        # JSON has no tuples, which is what torch has for betas.
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (settings.optimizer_args or {}).items()
    }

    def factory(params: list[Any]) -> torch.optim.Optimizer:
        try:
            optimizer: torch.optim.Optimizer = made(params, lr=settings.lr, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"--optimizer {settings.optimizer} with {arguments} cannot be made: {error}"
            ) from error
        return optimizer

    return {**options, "optimizer": factory}


def described(settings: Settings) -> str:
    """The optimizer of completed settings, for people."""
    parts = [settings.optimizer, f"lr {settings.lr:g}"]
    if settings.optimizer == OWN_OPTIMIZER:
        parts += [f"momentum {settings.momentum:g}", f"weight decay {settings.weight_decay:g}"]
        parts += ["nesterov"] if settings.nesterov else []
    parts += [f"{name} {value}" for name, value in (settings.optimizer_args or {}).items()]
    if settings.no_decay:
        parts.append(f"no weight decay for {', '.join(settings.no_decay)}")
    for name in ("clip_norm", "clip_value"):
        limit = getattr(settings, name)
        if limit is not None:
            parts.append(f"gradients clipped to {name.removeprefix('clip_')} {limit:g}")
    if settings.accumulate > 1:
        parts.append(f"{settings.accumulate} batches per update")
    return ", ".join(parts)


def _class_of(name: str) -> Any:
    if name not in _classes():
        raise ValueError(
            f"Unknown optimizer {name!r}.{did_you_mean(name, names())} Known ones: "
            f"{', '.join(names())}."
        )
    return getattr(torch.optim, name)


def _classes() -> list[str]:
    return sorted(
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    )
