"""What a refusal must be, and that what is allowed agrees with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, batches, largest_difference, oracle, same_bits
from torch import Tensor, nn

from fdg_cuda import FDGRunner

TOLERANCE = 1e-10  # float64, relative
WIDTH = 5
SPLITS = [pytest.param([2], id="given-split"), pytest.param(None, id="measured-split")]

Data = list[tuple[Tensor, Tensor]]


def chain(*, inner: list[nn.Module] | None = None) -> nn.Sequential:
    """Linear, Tanh, ``inner`` (default Linear, Tanh), Linear in float64."""
    torch.manual_seed(3)
    middle = [nn.Linear(WIDTH, WIDTH), nn.Tanh()] if inner is None else inner
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.Tanh(), *middle, nn.Linear(WIDTH, CLASSES)
    ).double()


def runner_of(model: Any, stages: int = 2, **options: Any) -> FDGRunner:
    return FDGRunner(model, ["cpu"] * stages, **options)


@contextmanager
def refused(
    error: type[Exception] | tuple[type[Exception], ...],
    *words: str,
    model: nn.Module | None = None,
) -> Iterator[None]:
    """The body raises ``error``, its message holds all ``words``, and ``model`` is untouched."""
    before = copy.deepcopy(model.state_dict()) if model is not None else {}
    parameters = list(model.parameters()) if model is not None else []
    wanted = [p.requires_grad for p in parameters]
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    if model is not None:
        assert same_bits(model.state_dict(), before)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [p.requires_grad for p in parameters] == wanted


def agrees_with_oracle(
    model: nn.Sequential, split: list[int], data: Data | None = None, **options: Any
) -> None:
    """Trains ``model`` and compares weights, buffers and losses."""
    data = batches(6) if data is None else data
    settings = {"lr": 0.1, **options}
    untrained = copy.deepcopy(model.state_dict())
    expected, recorded = oracle(model, split, data, **settings)
    history = runner_of(model, len(split) + 1, split=split, **settings).fit(data)
    assert largest_difference(model.state_dict(), expected) < TOLERANCE
    assert history.batch_losses == pytest.approx(recorded.losses, rel=TOLERANCE)
    assert not same_bits(model.state_dict(), untrained)
