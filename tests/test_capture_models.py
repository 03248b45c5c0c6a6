"""Captured models compute what the originals do, to the bit, however they are cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from captured_models import FAMILIES, OTHERS, made
from torch import Tensor, nn

from fdg_cuda.capture import capture
from fdg_cuda.graph_chain import GraphChain
from fdg_cuda.nested import map_tensors, tensors

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded")

STAGES = (2, 3, 4)
# A cut gives an error signal the layout of what crossed it, here a permuted tensor's; sums over it
# then come in another order than in one graph.
ROUNDED = ("convnext",)


def even_cuts(chain: GraphChain, stages: int) -> list[int]:
    return [len(chain) * k // stages for k in range(1, stages)]


def plain_call(chain: GraphChain, value: Any) -> Any:
    args, kwargs = chain.form.call.arguments(value)
    return chain.model(*args, **kwargs)


def loss_of(output: Any) -> Tensor:
    return sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum()
        for t in tensors(output)
    )  # type: ignore[return-value]


def taken(hop: Any) -> Any:
    """As a stage gets it: leaves of a graph of its own."""
    return map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), hop)


def step(stages: Sequence[nn.Module], value: Any) -> Any:
    """Forward and backward stage by stage, with nothing but what crosses the cuts; the output."""
    entered, left = [], []
    hop = value
    for stage in stages:
        hop = taken(hop) if left else hop
        entered.append(hop)
        hop = stage(hop)
        left.append(hop)
    loss_of(hop).backward()
    for k in range(len(stages) - 2, -1, -1):
        errors = [t.grad for t in tensors(entered[k + 1])]
        pairs = [
            (root, error)
            for root, error in zip(tensors(left[k]), errors, strict=True)
            if error is not None and root.requires_grad
        ]
        torch.autograd.backward([root for root, _ in pairs], [error for _, error in pairs])
    return hop


def state(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], *, exactly: bool
) -> None:
    for key, gradient in found.items():
        expected = wanted[key]
        assert (gradient is None) == (expected is None), key
        if gradient is not None and expected is not None:
            close = torch.equal if exactly else partial(torch.allclose, rtol=1e-4, atol=1e-6)
            assert close(gradient, expected), key


def assert_same(one: Any, other: Any) -> None:
    a, b = tensors(one), tensors(other)
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert repr(map_tensors(lambda t: None, one)) == repr(map_tensors(lambda t: None, other))


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_is_the_model_to_the_bit(name: str) -> None:
    """Outputs in evaluation mode; outputs, gradients and BatchNorm statistics in training mode with
    equal dropout; for every number of stages, stage by stage as a runner does it."""
    model, sample = made(name)
    keys = list(model.state_dict())
    chain = capture(model, sample)
    cuts = [even_cuts(chain, stages) for stages in STAGES]
    before = state(model)

    model.eval()
    with torch.no_grad():
        expected = plain_call(chain, sample)
        for split in cuts:
            hop = sample
            for stage in chain.stages(split):
                hop = stage(hop)
            assert_same(hop, expected)

    model.train()
    start = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = plain_call(chain, sample)
    loss_of(expected).backward()
    wanted, statistics = gradients(model), state(model)
    for split in cuts:
        model.load_state_dict(start)
        torch.manual_seed(5)
        assert_same(step(chain.stages(split), sample), expected)
        assert_same_gradients(gradients(model), wanted, exactly=name not in ROUNDED)
        assert all(map(torch.equal, state(model), statistics))
    if name in ROUNDED:
        model.load_state_dict(start)
        torch.manual_seed(5)
        loss_of(nn.Sequential(*chain.stages(cuts[-1]))(sample)).backward()
        assert_same_gradients(gradients(model), wanted, exactly=True)
    assert list(model.state_dict()) == keys
    if any("running_mean" in key for key in keys):
        assert not all(map(torch.equal, statistics, before))
