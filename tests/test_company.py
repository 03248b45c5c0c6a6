"""How much longer stages take beside others."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor, nn

from fdg_cuda import company
from fdg_cuda.company import CopyError, slowdown_in_company
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.precision import Precision

PASS_SECONDS = 0.02
only_one = threading.Lock()


class Sleeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(PASS_SECONDS)
        return x


class SleepsAlone(nn.Module):
    """As if there were one core."""

    def forward(self, x: Tensor) -> Tensor:
        with only_one:
            time.sleep(PASS_SECONDS)
        return x


def slowdown(*layers: nn.Module, stages: int) -> float:
    batch = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    return slowdown_in_company(
        [nn.Linear(3, 3), *layers],
        batch,
        cross_entropy,
        stages=stages,
        threads=1,
        precision=Precision.FLOAT32,
    )


def test_stages_that_share_nothing_take_as_long_as_one() -> None:
    assert 1 <= slowdown(Sleeps(), stages=3) < 1.6


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_that_take_turns_take_as_long_as_all_together(stages: int) -> None:
    assert slowdown(SleepsAlone(), stages=stages) == pytest.approx(stages, rel=0.25)


def test_one_stage_has_no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "run_whole", None)
    assert slowdown(stages=1) == 1


def test_no_trace_is_left(one_torch_thread: None) -> None:
    layers = [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()]
    before = [tensor.clone() for layer in layers for tensor in layer.state_dict().values()]
    gradient = layers[0].weight.grad = torch.ones(3, 3)
    torch.manual_seed(1)
    slowdown(*layers, stages=1)  # draws what the call itself draws here
    random_state = torch.random.get_rng_state()
    torch.manual_seed(1)
    slowdown(*layers, stages=2)
    after = [tensor for layer in layers for tensor in layer.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert layers[0].weight.grad is gradient
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert torch.get_num_threads() == 1


def test_what_cannot_be_copied_is_said() -> None:
    layer = nn.Linear(3, 3)
    layer.scaled = layer.weight * 2  # not a leaf
    with pytest.raises(CopyError, match="RuntimeError: Only Tensors created explicitly"):
        slowdown(layer, stages=2)


def test_errors_of_the_model_come_out() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        slowdown(nn.Linear(5, 3), stages=2)
