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
    ("shape", "labels", "found"),
    [
        ((2, 3), [0, 9], "0 to 9"),
        ((3,), 9, "9 to 9"),
        ((2, 3, 1), [[0], [9]], "0 to 9"),
        ((2, 3), [-1, 2], "-1 to 2"),
        ((3, 3), [-100, 1, 3], "1 to 3"),
    ],
)
def test_labels_that_are_no_classes(shape: tuple[int, ...], labels: object, found: str) -> None:
    with pytest.raises(ValueError, match=f"3 classes, .* from {found}; .* between 0 and 2"):
        cross_entropy(torch.randn(shape), torch.tensor(labels))


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((2, 3), torch.zeros(2, 1, dtype=torch.long)),
        ((2, 3), torch.zeros(2)),
        ((2, 3), torch.zeros(2, dtype=torch.int32)),
        ((2, 3), torch.zeros(4, dtype=torch.long)),
        ((2, 3), torch.zeros(2, 4)),
        ((2, 3, 5), torch.zeros(2, 4, dtype=torch.long)),
    ],
)
def test_targets_that_do_not_go_with_the_output(shape: tuple[int, ...], target: Tensor) -> None:
    with pytest.raises(ValueError, match="whole labels") as raised:
        cross_entropy(torch.randn(shape), target)
    assert f"got torch.float32 {shape} and {target.dtype} {tuple(target.shape)}" in str(
        raised.value
    )


def test_other_errors_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(F, "cross_entropy", fails)
    with pytest.raises(RuntimeError, match=r"^no memory left$"):
        cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))


def test_no_classes_at_all() -> None:
    with pytest.raises(IndexError, match="Dimension out of range"):
        cross_entropy(torch.tensor(1.0), torch.tensor([0]))


def test_it_is_said_at_the_first_batch() -> None:
    runner = FDGRunner(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), ["cpu", "cpu"], split=[1])
    with pytest.raises(ValueError, match="labels go from 5 to 5") as raised:
        runner.fit([(torch.randn(2, 4), torch.tensor([5, 5]))])
    assert "batch 0" in "".join(raised.value.__notes__)
