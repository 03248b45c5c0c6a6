"""Which weights a stage may hold after an interrupted run: those of an untroubled one."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from chains import Batch, even_split, mlp, oracle
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner, reference

TOLERANCE = 1e-10  # float64, relative
LAYERS = 8

State = dict[str, Tensor]


def runner_of(model: nn.Sequential, stages: int = 2, **options: Any) -> FDGRunner:
    settings = {"split": even_split(len(model), stages), "lr": 0.05, **options}
    return FDGRunner(model, ["cpu"] * stages, **settings)


def state(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def versions(
    model: nn.Sequential, split: list[int], data: list[Batch], **options: Any
) -> list[list[Tensor]]:
    """Per stage its flat weights after 0, 1, 2, ... updates of an uninterrupted run of the oracle,
    which asks for the loss of batch b when every stage has made b updates."""
    whole = copy.deepcopy(model)
    bounds = [0, *split, len(model)]
    stages = [nn.Sequential(*whole[a:b]) for a, b in pairwise(bounds)]
    kept: list[list[Tensor]] = [[] for _ in stages]

    def keep() -> None:
        for stage, versions_of_stage in zip(stages, kept, strict=True):
            versions_of_stage.append(flat(stage))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        keep()
        return F.cross_entropy(output, target)

    reference.train(stages, data, loss_fn=loss, **{"lr": 0.05, **options})
    keep()
    return kept


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def check_versions(model: nn.Sequential, split: list[int], known: list[list[Tensor]]) -> list[int]:
    """Every stage of ``model`` holds exactly one of its known versions; returns their numbers."""
    found = []
    for (a, b), of_stage in zip(pairwise([0, *split, len(model)]), known, strict=True):
        weights = flat(model[a:b])
        distances = [float((weights - version).abs().max()) for version in of_stage]
        assert min(distances) < TOLERANCE, f"layers {a} to {b - 1} hold no whole version"
        found.append(distances.index(min(distances)))
    return found


def oracle_of(
    initial: State, split: list[int], data: list[Batch], **options: Any
) -> tuple[State, reference.ReferenceResult]:
    model = mlp()
    model.load_state_dict(initial)
    return oracle(model, split, data, **{"lr": 0.05, **options})
