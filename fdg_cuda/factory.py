"""Optimizers that the caller's factory makes: one per stage, and one whose groups the caller drives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Given a list of parameters, or of parameter groups if the runner has any.
Factory = Callable[[list[Any]], torch.optim.Optimizer]

EXAMPLE = "optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4)"


def check_factory(factory: Any) -> None:
    """Raises:
    TypeError: it is no factory.
    """
    if factory is not None and not callable(factory):
        what = (
            "an optimizer that was made already"
            if isinstance(factory, torch.optim.Optimizer)
            else f"a {type(factory).__name__}"
        )
        raise TypeError(
            f"optimizer must be a function that makes one, since every stage has its own ({EXAMPLE}); "
            f"got {what}"
        )


def call_factory(factory: Factory, given: list[Any], whose: str) -> torch.optim.Optimizer:
    """The optimizer of ``given``, parameters or groups of them.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it covers other parameters, or cannot be stepped by a stage.
    """
    made: Any = factory(list(given))
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"the factory given as optimizer must return a torch.optim.Optimizer ({EXAMPLE}); for "
            f"{whose} it returned a {type(made).__name__}"
        )
    name = type(made).__name__
    if isinstance(made, torch.optim.SparseAdam):
        raise ValueError(
            f"{name} is for sparse gradients, but those of a stage are dense; use Adam"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{name} evaluates the model again in its step (a closure), but a stage has only the "
            f"gradients of one batch; use an optimizer whose step() needs no closure"
        )
    asked = {id(parameter) for parameter in _parameters(given)}
    covered = {id(parameter) for parameter in _parameters(made.param_groups)}
    if asked != covered:
        raise ValueError(
            f"the factory given as optimizer must use just the parameters that it is called with; "
            f"for {whose} its {name} leaves out {len(asked - covered)} of {len(asked)} and has "
            f"{len(covered - asked)} others. To leave parameters as they are, use requires_grad_(False)"
        )
    return made


def _parameters(given: list[Any]) -> list[Tensor]:
    """Of a list of parameters or of groups."""
    lists = (entry["params"] if isinstance(entry, dict) else [entry] for entry in given)
    return [parameter for entries in lists for parameter in entries]
