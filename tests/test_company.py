"""How much longer stages take beside others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fdg_cuda import company
from fdg_cuda.company import slowdown_in_company
from fdg_cuda.metrics import cross_entropy
from fdg_cuda.nested import Nested
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision
from fdg_cuda.staged_model import chain_of, lay_out

HALF_SECONDS = 0.05
FEATURES = 3
BATCH = torch.randn(4, FEATURES), torch.tensor([0, 1, 2, 0])


class Crowded(nn.Module):
    """Takes half as long again for every other one at work."""

    at_work = 0
    lock = threading.Lock()

    def __init__(self, shares: bool = True) -> None:
        super().__init__()
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        self.count(1)
        time.sleep(HALF_SECONDS)
        others = Crowded.at_work if self.shares else 1
        time.sleep(HALF_SECONDS * others)
        self.count(-1)
        return x

    def count(self, more: int) -> None:
        with self.lock:
            Crowded.at_work += more


def slowdown(
    *parts: Sequence[nn.Module],
    batch: tuple[Nested, Nested] = BATCH,
    loss: LossFunction = cross_entropy,
    threads: int = 1,
) -> float:
    return slowdown_in_company(parts, batch, loss, threads=threads, precision=Precision.FLOAT32)


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


@pytest.mark.parametrize("stages", [2, 3])
def test_by_what_they_share(stages: int) -> None:
    parts = [[Crowded(), linear()] for _ in range(stages)]
    assert slowdown(*parts) == pytest.approx((1 + stages) / 2, rel=0.2)


def test_stages_that_share_nothing_take_as_long_as_alone() -> None:
    assert 1 <= slowdown(*([Crowded(shares=False), linear()] for _ in range(2))) < 1.2


def test_one_stage_has_no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "_slowdown", None)
    assert slowdown([linear(), linear()]) == 1


class Notes(nn.Module):
    """What comes through, and the gradient that comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []
        self.errors: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.detach().clone(), torch.get_num_threads()))
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda error: self.errors.append(error.clone()))
        return x


def test_every_pass_is_the_stage_s_part_of_the_batch() -> None:
    below, above = Notes(), Notes()
    layers = [linear(), below, linear(), above, linear()]
    slowdown(layers[:2], layers[2:], threads=2)
    x, target = BATCH
    whole = Notes(), Notes()
    cross_entropy(layers[4](whole[1](layers[2](whole[0](layers[0](x))))), target).backward()
    for found, expected in zip((below, above), whole, strict=True):
        assert len(found.seen) == len(found.errors) > 3
        assert all(torch.equal(x, expected.seen[0][0]) for x, _ in found.seen)
        assert all(torch.equal(error, expected.errors[0]) for error in found.errors)
        assert {threads for _, threads in found.seen[1:]} == {2}


def test_values_that_travel_along() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = linear(), linear(), linear()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            skip = self.a(x)
            return torch.where(mask, self.c(self.b(skip).relu()), skip)

    inputs = (BATCH[0], torch.tensor([True, False, True]))
    chain = chain_of(Skips())
    lay_out(chain, inputs, Precision.FLOAT32)
    layers = chain.layers
    assert len(layers) > 2
    for cut in range(1, len(layers)):
        assert slowdown(layers[:cut], layers[cut:], batch=(inputs, BATCH[1])) >= 1


def test_no_trace_is_left() -> None:
    torch.manual_seed(0)
    layers = [linear(), nn.BatchNorm1d(FEATURES), nn.Dropout(), linear(), nn.BatchNorm1d(FEATURES)]
    before = [tensor.clone() for layer in layers for tensor in layer.state_dict().values()]
    gradient = torch.ones(FEATURES, FEATURES)
    layers[0].weight.grad = gradient
    random_state = torch.random.get_rng_state()
    slowdown(layers[:3], layers[3:], threads=2)
    after = [tensor for layer in layers for tensor in layer.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert layers[0].weight.grad is gradient
    assert layers[3].weight.grad is None
    assert torch.equal(random_state, torch.random.get_rng_state())


class RaisesLater(nn.Module):
    """Not yet when what stages take is recorded; and not before another stage is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("as it should")
        return x


class SlowNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(HALF_SECONDS)
        return x + torch.randn(x.shape)


def test_an_error_comes_out_once_all_have_ended() -> None:
    parts = [RaisesLater(), linear()], [SlowNoise(), linear()]
    random_state = torch.random.get_rng_state()
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="as it should"):
        slowdown(*parts)
    assert threading.active_count() == threads
    assert torch.equal(random_state, torch.random.get_rng_state())
