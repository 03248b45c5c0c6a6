"""Dtypes, layouts and gradients that are out of the ordinary."""

from __future__ import annotations

import pytest
import torch
from chains import CLASSES, FEATURES, batches, largest_difference, oracle
from refusals import WIDTH, agrees_with_oracle, chain, refused, runner_of
from torch import Tensor, nn

from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_weights_a_cpu_does_not_train(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES))
    for layer in model:  # not model.to(dtype), which warns of complex numbers
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach().to(dtype)))
    with refused(TypeError, "0.weight", str(dtype), "model.float()", model=model):
        runner_of(model)


def test_dtypes_mixed_in_a_stage() -> None:
    model = chain()
    model[4].float()
    words = ["stage 1", "torch.float32", "torch.float64", "model.float()", "cut"]
    with refused(TypeError, *words, model=model):
        runner_of(model, split=[2])


def test_dtype_that_changes_at_a_cut() -> None:
    class ToDouble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model = chain(inner=[ToDouble(), nn.Linear(WIDTH, WIDTH)])
    model[0].float()
    data = [(x.float(), y) for x, y in batches(6)]
    expected, _ = oracle(model, [2], data, lr=0.1)
    runner_of(model, split=[2], lr=0.1).fit(data)
    assert largest_difference(model.state_dict(), expected) < 1e-5  # the float32 part
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 4


@pytest.mark.parametrize("split", [[1], [3], None], ids=str)
def test_sparse_gradients(split: list[int] | None) -> None:
    layers = [nn.Embedding(10, WIDTH, sparse=True), nn.Flatten(), nn.Linear(3 * WIDTH, CLASSES)]
    model = nn.Sequential(*layers, nn.Tanh()).double()
    data = [(torch.randint(10, (6, 3)), torch.randint(CLASSES, (6,))) for _ in range(4)]
    with refused(TypeError, "stage 0", "(10, 5)", "sparse", "sparse=False"):
        runner_of(model, split=split).fit(data)
    model[0].sparse = False
    agrees_with_oracle(model, [1], data)


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_convolutions(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    model = model.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = [
        (torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (5,)))
        for _ in range(6)
    ]
    data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    agrees_with_oracle(model, [2, 4], data, method=method)
    for index in (0, 3):
        assert model[index].weight.is_contiguous(memory_format=torch.channels_last)
