"""Stages without parameters; frozen, shared and tied ones."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import CLASSES, FEATURES, batches, largest_difference, oracle, same_bits
from refusals import SPLITS, TOLERANCE, WIDTH, agrees_with_oracle, chain, refused, runner_of
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [[2, 5], [3, 5], [4, 6]], ids=["first", "middle", "last"])
def test_stage_without_parameters(split: list[int], method: str, backward_weights: str) -> None:
    linear = [nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)]
    model = {
        2: [nn.Hardtanh(), nn.Tanh(), linear[0], nn.Tanh(), nn.Tanh(), linear[1]],
        3: [linear[0], nn.Tanh(), nn.Tanh(), nn.Hardtanh(), nn.Tanh(), linear[1]],
        4: [linear[0], nn.Tanh(), nn.Tanh(), linear[1], nn.Tanh(), nn.Tanh(), nn.Hardtanh()],
    }[split[0]]
    agrees_with_oracle(
        nn.Sequential(*model).double(), split, method=method, backward_weights=backward_weights
    )


@pytest.mark.parametrize("when", ["given", "measured", "buffer"])
def test_tensor_shared_by_two_stages(when: str) -> None:
    if when == "buffer":
        norm = nn.BatchNorm1d(WIDTH, affine=False)
        model = chain(inner=[norm, nn.Tanh(), norm])
    else:
        model = chain(inner=[nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
        model[4].weight = model[2].weight
    if when == "measured":
        runner = runner_of(model, len(model))
        words = ["layers that share a parameter", "at most 4 devices", "untie"]
        with refused(ValueError, *words, model=model):
            runner.fit(batches(2))
    else:
        words = ["shared by stages 0 and 1", "split", "of its own"]
        with refused(ValueError, *words, model=model):
            runner_of(model, split=[4])
    assert len(runner_of(model, split=[1]).fit(batches(2)).batch_losses) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [[2], [1, 5]], ids=["two-stages", "three-stages"])
def test_parameter_shared_within_a_stage(split: list[int], method: str) -> None:
    model = chain(inner=[nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
    model[4].weight = model[2].weight
    agrees_with_oracle(model, split, method=method)
    assert model[4].weight is model[2].weight


def test_layer_used_twice_within_a_stage() -> None:
    """Against torch.optim.SGD: torch.func.functional_call, which the oracle uses, puts leaves of
    its own into a module that it meets twice."""
    twice = nn.Linear(WIDTH, WIDTH)
    model, data = chain(inner=[twice, nn.Tanh(), twice]), batches(5)
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in data:
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
    runner_of(model, split=[1], method="bp").fit(data)
    assert largest_difference(model.state_dict(), twin.state_dict()) < TOLERANCE
    assert model[2] is model[4] is twice


def test_parameter_shared_by_two_stages_since_the_last_fit() -> None:
    model = chain()
    runner = runner_of(model, split=[2])
    runner.fit(batches(2))
    model[4].bias = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))
    runner.fit(batches(2))
    model[0].bias = model[2].bias
    with refused(ValueError, "shared by stages 0 and 1"):
        runner.fit(batches(2))


@pytest.mark.parametrize("when", ["new", "later"])
@pytest.mark.parametrize("split", [[2], [3]], ids=["one-stage", "two-stages"])
def test_parameters_tied_by_memory_only(split: list[int], when: str) -> None:
    """``a.data = b.data``: flat memory would give each its own, and untie them without a word."""
    model = chain(inner=[nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
    runner = runner_of(model, split=split) if when == "later" else None
    if runner is not None:
        runner.fit(batches(2))
    model[4].weight.data = model[2].weight.data[:]
    words = ["2.weight", "4.weight", "same memory", "a.weight"]
    with refused(ValueError, *words):
        if runner is None:
            runner_of(model, split=split)
        else:
            runner.fit(batches(2))
    model[4].weight = model[2].weight
    runner_of(model, split=[2]).fit(batches(2))


class Two(nn.Module):
    """Adds two matrix products."""

    def __init__(self, a: Tensor, b: Tensor, *, trained: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=trained)
        self.b = nn.Parameter(b, requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a + x @ self.b


def test_parameters_side_by_side_in_one_memory() -> None:
    """Their spans overlap, their elements do not."""
    both = torch.randn(WIDTH, 2 * WIDTH, dtype=torch.float64)
    model = chain(inner=[nn.Tanh()])
    model[2] = Two(both[:, :WIDTH], both[:, WIDTH:], trained=True)
    agrees_with_oracle(model, [1])


def test_frozen_parameters_may_share_memory() -> None:
    one = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    model = chain(inner=[nn.Tanh()])
    model[2] = Two(one, one, trained=False)
    agrees_with_oracle(model, [1])


def test_frozen_sparse_parameter() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            adjacency = torch.eye(WIDTH, dtype=torch.float64).to_sparse()
            self.adjacency = nn.Parameter(adjacency, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacency, x.t()).t()

    model = chain(inner=[nn.Tanh()])
    model[2] = Sparse()
    assert len(runner_of(model, split=[1]).fit(batches(3)).batch_losses) == 3


def test_another_runner_may_cut_elsewhere() -> None:
    """Parameters of one stage lie in one flat memory, but not in the same place."""
    model = chain()
    runner_of(model, split=[2]).fit(batches(2))
    runner_of(model, split=[1]).fit(batches(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", [[0], [2], [4], [0, 2], [2, 4]], ids=str)
def test_frozen_parameters_keep_their_bits(frozen: list[int], method: str) -> None:
    """With one layer per stage a frozen layer is a whole frozen stage."""
    model = chain()
    for index in frozen:
        model[index].requires_grad_(False)
    before = copy.deepcopy([model[index].state_dict() for index in frozen])
    agrees_with_oracle(model, [2, 4], method=method)
    for index, bits in zip(frozen, before, strict=True):
        assert same_bits(model[index].state_dict(), bits)
        assert not any(p.requires_grad for p in model[index].parameters())


def test_partly_frozen_stage() -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = model[0].weight.clone(), model[2].bias.clone()
    agrees_with_oracle(model, [3])
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].bias, before[1])


@pytest.mark.parametrize("layer", [0, 2, 4], ids=["first-stage", "middle-stage", "last-stage"])
def test_unfreezing_and_freezing_between_fits(layer: int) -> None:
    """Without momentum the oracle, started anew for each fit, says what comes out."""
    model, split, data = chain(), [2, 4], batches(5)
    runner = runner_of(model, 3, split=split, lr=0.1, momentum=0.0)
    for trainable in (True, False, True):
        model[layer].requires_grad_(trainable)
        before = model[layer].weight.clone()
        expected, _ = oracle(model, split, data, lr=0.1, momentum=0.0)
        runner.fit(data)
        assert largest_difference(model.state_dict(), expected) < TOLERANCE
        assert torch.equal(model[layer].weight, before) is not trainable


def test_no_trainable_parameter() -> None:
    with refused(ValueError, "no trainable parameter", "requires_grad"):
        runner_of(chain().requires_grad_(False))
    with refused(ValueError, "no trainable parameter"):
        runner_of([nn.Tanh(), nn.Flatten()])


@pytest.mark.parametrize("split", SPLITS)
def test_everything_frozen_since_the_runner_was_made(split: list[int] | None) -> None:
    model = chain()
    runner = runner_of(model, split=split)
    model.requires_grad_(False)
    with refused(ValueError, "no trainable parameter", model=model):
        runner.fit(batches(2))
