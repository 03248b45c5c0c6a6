"""Small chains and data the tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda import FDGRunner, reference

Batch = tuple[Tensor, Tensor]
FEATURES, CLASSES = 6, 4


def mlp(seed: int = 1, *, batch_norm: bool = True, layers: int = 8) -> nn.Sequential:
    """A float64 chain of ``layers`` children, three of them at least."""
    torch.manual_seed(seed)
    width = 12
    middle: list[nn.Module] = []
    while len(middle) < layers - 2:
        middle.append(nn.Linear(width, width))
        middle.append(nn.BatchNorm1d(width) if batch_norm and len(middle) % 4 == 1 else nn.Tanh())
    chain = [nn.Linear(FEATURES, width), *middle[: layers - 2], nn.Linear(width, CLASSES)]
    return nn.Sequential(*chain).double()


def batches(count: int = 10, *, size: int = 8, last: int | None = 3, seed: int = 0) -> list[Batch]:
    """``count`` float64 batches; the last one smaller."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * count
    if last is not None:
        sizes[-1] = last
    return [
        (
            torch.randn(n, FEATURES, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def convolutional() -> nn.Sequential:
    """A float64 chain in channels_last; its third child works in place."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).double()
    return model.to(memory_format=torch.channels_last)


def images(count: int, *, channels_last: bool = False) -> list[Batch]:
    """``count`` batches for :func:`convolutional`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        (
            torch.randn(6, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=layout),
            torch.randint(0, CLASSES, (6,)),
        )
        for _ in range(count)
    ]


def even_split(layers: int, stages: int) -> list[int]:
    return [layers * k // stages for k in range(1, stages)]


def cut(model: nn.Sequential, split: Sequence[int]) -> list[nn.Sequential]:
    """Stages of a deep copy of ``model``."""
    layers = list(copy.deepcopy(model))
    return [nn.Sequential(*layers[a:b]) for a, b in pairwise([0, *split, len(layers)])]


def oracle(
    model: nn.Sequential, split: Sequence[int], data: Sequence[Batch], **settings: object
) -> tuple[dict[str, Tensor], reference.ReferenceResult]:
    """The oracle's trained state_dict, with ``model``'s keys, and what it recorded."""
    stages = cut(model, split)
    result = reference.train(stages, data, **settings)  # type: ignore[arg-type]
    whole = nn.Sequential(*(layer for stage in stages for layer in stage))
    return whole.state_dict(), result


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all entries, relative to each entry's largest magnitude (at least 1e-3)."""
    assert a.keys() == b.keys()
    worst = 0.0
    for key, value in a.items():
        x, y = value.double(), b[key].double()
        scale = max(float(y.abs().max()), 1e-3) if y.numel() else 1.0
        worst = max(worst, float((x - y).abs().max()) / scale if y.numel() else 0.0)
    return worst


def compare(
    model: nn.Sequential,
    split: list[int],
    data: list[Batch],
    *,
    device: str | int = "cpu",
    prepare: Callable[[FDGRunner], object] = lambda runner: None,
    runner_options: dict[str, Any] | None = None,
    **options: Any,
) -> float:
    """The largest relative difference of losses, weights and buffers between runner and oracle.

    ``prepare`` is called with the runner before it trains; ``runner_options`` are not the oracle's.
    """
    epochs = options.pop("epochs", 1)
    expected, recorded = oracle(model, split, data, epochs=epochs, **options)
    runner = FDGRunner(
        model, [device] * (len(split) + 1), split=split, **options, **(runner_options or {})
    )
    prepare(runner)
    history = runner.fit(data, epochs=epochs)
    assert len(history.batch_losses) == len(recorded.losses) == epochs * len(data)
    losses = max(
        abs(a - b) / max(abs(b), 1e-3)
        for a, b in zip(history.batch_losses, recorded.losses, strict=True)
    )
    return max(losses, largest_difference(runner.state_dict(), expected))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
