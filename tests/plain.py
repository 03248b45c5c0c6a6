"""Evaluation and prediction with the plain model, batch after batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import Evaluation


def plain_outputs(model: nn.Module, data: list[Any]) -> list[Tensor]:
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        return [plain(copy.deepcopy(x)) for x, _ in data]


def plain_evaluation(
    model: nn.Module, data: list[Any], loss_fn: Any = F.cross_entropy
) -> Evaluation:
    loss, correct, samples = 0.0, 0, 0
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        for x, y in data:
            output = plain(copy.deepcopy(x))
            loss += float(loss_fn(output, y)) * len(output)
            if isinstance(y, Tensor):
                correct += int((output.argmax(1) == y).sum())
            samples += len(output)
    accuracy = correct / samples if isinstance(data[0][1], Tensor) else None
    return Evaluation(loss / samples, accuracy, samples)


def agrees(found: Evaluation, expected: Evaluation) -> bool:
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    return (found.accuracy, found.samples) == (expected.accuracy, expected.samples)
