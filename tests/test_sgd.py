"""The fused update against torch.optim.SGD, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fdg_cuda import flat
from fdg_cuda.flat import ALIGNMENT_BYTES, FlatMemory

SHAPES = [(3, 5), (64, 16, 3, 3), (1,), (1000,), (17,), (64, 64)]
HYPER = {"lr": 0.07, "momentum": 0.9, "weight_decay": 5e-4}


def parameters(
    dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def hyper_table(shrink: float = 1.0, *, nesterov: bool = False, **changes: float) -> np.ndarray:
    values = {**HYPER, **changes}
    return np.array(
        [[values["lr"], values["momentum"], values["weight_decay"], float(nesterov), shrink]]
    )


def set_gradients(memory: FlatMemory, copy: int, gradients: list[torch.Tensor | None]) -> None:
    for leaf, gradient in zip(memory.leaves[copy], gradients, strict=True):
        leaf.grad = None if gradient is None else gradient.clone()
    memory.collect_gradients(copy)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_sgd_bit_for_bit(
    dtype: torch.dtype,
    nesterov: bool,
    copies: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flat, "SHARED_FROM_BYTES", 0)  # all threads, though there is little to do
    mine, theirs = parameters(dtype), parameters(dtype)
    memory = FlatMemory(mine, copies, 0)
    hyper = hyper_table(nesterov=nesterov)
    update = memory.cpu_sgd(hyper, threads)
    optimizer = torch.optim.SGD(theirs, nesterov=nesterov, **HYPER)
    for step in range(7):
        gradients = [p.detach().clone() for p in parameters(dtype, seed=step + 1)]
        target = (step + 1) % copies
        set_gradients(memory, target, gradients)
        update.run_update(step % copies, target, step)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert memory.newest == target
        for leaf, parameter in zip(memory.leaves[target], theirs, strict=True):
            assert torch.equal(leaf, parameter)
    assert memory.updates == 7


@pytest.mark.parametrize(("elements", "threads"), [(99_000, 1), (101_000, 3)])
def test_little_is_updated_by_one_thread(
    elements: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(flat, "FlatSgd", lambda threads, **_: asked.append(threads))
    FlatMemory(parameters(torch.float32, [(elements,)]), 1, 0).cpu_sgd(hyper_table(), 3)
    assert asked == [threads]


def test_large_arrays_take_the_streaming_path_and_keep_their_bits() -> None:
    shapes = [(3_000_001,), (7,), (1023,)]
    mine, theirs = parameters(torch.float32, shapes), parameters(torch.float32, shapes)
    memory = FlatMemory(mine, 2, 0)
    hyper = hyper_table()
    gradients = [p.detach().clone() for p in parameters(torch.float32, shapes, seed=9)]
    set_gradients(memory, 1, gradients)
    memory.cpu_sgd(hyper, 2).run_update(0, 1, 0)
    optimizer = torch.optim.SGD(theirs, **HYPER)
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient
    before = [parameter.detach().clone() for parameter in theirs]
    optimizer.step()
    for new, old, expected, start in zip(*memory.leaves[::-1], theirs, before, strict=True):
        assert torch.equal(new, expected)
        assert torch.equal(old, start), "the copy read from must not change"


@pytest.mark.parametrize("shrink", [0.5, 0.3])
def test_only_the_gradient_is_shrunk(shrink: float) -> None:
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    memory = FlatMemory(mine, 1, 0)
    gradients = [p.detach().clone() for p in parameters(torch.float64, seed=4)]
    set_gradients(memory, 0, gradients)
    hyper = hyper_table(shrink)
    memory.cpu_sgd(hyper, 1).run_update(0, 0, 0)
    optimizer = torch.optim.SGD(theirs, **HYPER)
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = shrink * gradient
    optimizer.step()
    for leaf, parameter in zip(memory.leaves[0], theirs, strict=True):
        torch.testing.assert_close(leaf, parameter, rtol=1e-14, atol=1e-15)


def test_a_parameter_without_gradient_is_carried_over_untouched() -> None:
    memory = FlatMemory(parameters(torch.float32), 2, 0)
    gradients: list[torch.Tensor | None] = [None] * len(SHAPES)
    gradients[1] = torch.ones(SHAPES[1])
    set_gradients(memory, 1, gradients)
    hyper = hyper_table()
    memory.cpu_sgd(hyper, 1).run_update(0, 1, 0)
    for number, (old, new) in enumerate(zip(*memory.leaves, strict=True)):
        assert torch.equal(old, new) == (number != 1)


def test_the_batch_chooses_its_row_of_hyper_parameters() -> None:
    memory = FlatMemory([nn.Parameter(torch.zeros(4))], 1, 0)
    hyper = np.array([[0.1, 0, 0, 0, 1], [0.2, 0, 0, 0, 1], [0.4, 0, 0, 0, 1]], dtype=np.float64)
    update = memory.cpu_sgd(hyper, 1)
    for batch, lr in ((4, 0.2), (5, 0.4), (6, 0.1)):
        memory.weights[0].zero_()
        set_gradients(memory, 0, [torch.ones(4)])
        update.run_update(0, 0, batch)
        assert memory.leaves[0][0][0].item() == pytest.approx(-lr)


def test_views_keep_shape_strides_and_alignment() -> None:
    weight = nn.Parameter(torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    transposed = nn.Parameter(torch.randn(5, 7).t())
    original = [weight.detach().clone(), transposed.detach().clone()]
    memory = FlatMemory([weight, transposed], 2, 0)
    memory.publish()
    for leaf, parameter, value in zip(
        memory.leaves[0], (weight, transposed), original, strict=True
    ):
        assert leaf.stride() == value.stride()
        assert leaf.data_ptr() % ALIGNMENT_BYTES == 0
        assert parameter.data_ptr() == leaf.data_ptr()
        assert torch.equal(parameter, value)


def test_nan_and_infinity_pass_through() -> None:
    memory = FlatMemory([nn.Parameter(torch.zeros(3))], 1, 0)
    set_gradients(memory, 0, [torch.tensor([math.nan, math.inf, 1.0])])
    hyper = hyper_table()
    memory.cpu_sgd(hyper, 1).run_update(0, 0, 0)
    assert memory.leaves[0][0].isnan().tolist() == [True, False, False]
    assert memory.leaves[0][0].isinf().tolist() == [False, True, False]


def changed_strides(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.t().contiguous().t()


def repeated(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.flatten()[:1].expand(gradient.numel()).view(gradient.shape)


def lazily_negated(gradient: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(gradient)


def lazy_zeros(gradient: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(gradient.shape, dtype=gradient.dtype)


@pytest.mark.parametrize("odd", [changed_strides, repeated, lazily_negated, lazy_zeros])
def test_gradients_that_do_not_lie_like_their_parameter(
    odd: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The update reads memory. A hook may put any tensor into ``.grad``."""
    mine, theirs = (parameters(torch.float64, [(3, 5), (4, 4)]) for _ in range(2))
    memory = FlatMemory(mine, 2, 0)
    update = memory.cpu_sgd(hyper_table(), 1)
    gradient = torch.randn(3, 5, dtype=torch.float64)
    for leaf, parameter in zip(memory.leaves[0], theirs, strict=True):
        leaf.grad = torch.ones_like(leaf)
        parameter.grad = torch.ones_like(parameter)
    memory.leaves[0][0].grad = odd(gradient)
    theirs[0].grad = odd(gradient).clone()
    memory.collect_gradients(0)
    update.run_update(0, 1, 0)
    torch.optim.SGD(theirs, **HYPER).step()
    for leaf, parameter in zip(memory.leaves[1], theirs, strict=True):
        assert torch.equal(leaf, parameter)
