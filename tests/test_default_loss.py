"""The default loss refuses what it cannot mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner
from fdg_cuda.metrics import cross_entropy


def test_it_is_torch_s() -> None:
    output, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert torch.equal(cross_entropy(output, target), F.cross_entropy(output, target))


@pytest.mark.parametrize("output", [torch.randn(2, 1), torch.randn(2, 1, 5)])
def test_one_class_is_none(output: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one class, whose cross entropy .* is always 0"):
        cross_entropy(output, torch.zeros(2, dtype=torch.long))


def test_more_than_one_tensor() -> None:
    output, target = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match="output is a tuple"):
        cross_entropy((output, output), target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "labels"), [((2, 3), [0, 9]), ((3,), 9), ((2, 3, 1), [[0], [9]])]
)
def test_more_labels_than_classes(shape: tuple[int, ...], labels: object) -> None:
    with pytest.raises(ValueError, match=r"3 classes, and the labels go from \d to 9"):
        cross_entropy(torch.randn(shape), torch.tensor(labels))


def test_it_is_said_at_the_first_batch() -> None:
    runner = FDGRunner(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), ["cpu", "cpu"], split=[1])
    with pytest.raises(ValueError, match="labels go from 5 to 5") as raised:
        runner.fit([(torch.randn(2, 4), torch.tensor([5, 5]))])
    assert "batch 0" in "".join(raised.value.__notes__)
