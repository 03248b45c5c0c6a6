"""``backward_weights="replay"``: a stage keeps a batch's input, and forwards it again."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, batches, even_split, largest_difference, mlp, same_bits
from refusals import chain, refused, runner_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fdg_cuda import AliasedParameterError, FDGRunner
from fdg_cuda.schedule import METHODS, Schedule

MODES = ("stash", "current", "replay")


def trained(mode: str, model: nn.Sequential, stages: int, **options: Any) -> FDGRunner:
    model = copy.deepcopy(model)
    split = even_split(len(model), stages)
    settings = {"lr": 0.05, **options}
    runner = FDGRunner(model, ["cpu"] * stages, split=split, backward_weights=mode, **settings)
    torch.manual_seed(5)
    runner.fit(batches(12))
    return runner


@pytest.mark.parametrize("method", ["fdg", "ddg"])
def test_it_is_neither_stash_nor_current(method: str) -> None:
    states = {mode: trained(mode, mlp(), 3, method=method).state_dict() for mode in MODES}
    for one, other in (("stash", "current"), ("stash", "replay"), ("current", "replay")):
        assert largest_difference(states[one], states[other]) > 1e-6


@pytest.mark.parametrize(("method", "stages"), [("fdg", 1), ("bp", 1), ("bp", 3)])
def test_without_delay_all_modes_are_one(method: str, stages: int) -> None:
    states = [trained(mode, mlp(), stages, method=method).state_dict() for mode in MODES]
    assert same_bits(states[0], states[1])
    assert same_bits(states[0], states[2])


@pytest.mark.parametrize("stages", [2, 3])
def test_at_lr_0_the_weights_of_the_moment_are_those_of_the_forward(stages: int) -> None:
    """So all gradients (the momentum sums them up) are those of ``"stash"`` to the bit, dropout's
    masks included, and statistics have moved once per batch."""
    torch.manual_seed(2)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 12)]
    for _ in range(4):
        layers += [nn.Dropout(0.3), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.RReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, CLASSES)).double()
    stash, replay = (trained(mode, model, stages, lr=0.0) for mode in ("stash", "replay"))
    assert same_bits(stash.state_dict(), replay.state_dict())
    for one, other in zip(stash.stages, replay.stages, strict=True):
        assert one.memory.momentum.abs().sum() > 0
        assert torch.equal(one.memory.momentum, other.memory.momentum)
        assert all(map(torch.equal, one.random_state(), other.random_state()))


@pytest.mark.parametrize("method", METHODS)
def test_only_stages_with_a_delay_forward_twice(method: str) -> None:
    model = mlp()
    calls: Counter[tuple[int, bool]] = Counter()
    for k, layer in enumerate((model[0], model[3], model[7])):
        layer.register_forward_hook(
            lambda *_, k=k: calls.update([(k, torch.is_grad_enabled())])  # type: ignore[misc]
        )
    FDGRunner(
        model, ["cpu"] * 3, split=[2, 5], method=method, backward_weights="replay", lr=0.05
    ).fit(batches(9))
    delayed = [k for k in range(3) if Schedule(method, 3).delay(k) > 0]
    expected = {(k, True): 9 for k in range(3)} | {(k, False): 9 for k in delayed}
    assert calls == Counter(expected)
    assert delayed == ([] if method == "bp" else [0, 1])


class Watched(nn.Module):
    """An activation that autograd saves; counts those alive when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []
        self.most_alive = 0

    def forward(self, x: Tensor) -> Tensor:
        alive = sum(not ref.expired() for ref in self.made)
        self.most_alive = max(self.most_alive, alive)
        y = x.exp()
        self.made.append(StorageWeakRef(y.untyped_storage()))
        return y.tanh()


@pytest.mark.parametrize(("mode", "alive"), [("stash", 3), ("current", 3), ("replay", 0)])
def test_activations_are_gone_between_forward_and_backward(mode: str, alive: int) -> None:
    """When stage 0 of three begins a forward it holds three batches besides."""
    torch.manual_seed(1)
    watched = Watched()
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), watched, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
    ).double()
    FDGRunner(model, ["cpu"] * 3, split=[3, 4], backward_weights=mode, lr=0.05).fit(batches(12))
    assert watched.most_alive == alive


def test_one_weight_copy_per_stage() -> None:
    runner = trained("replay", mlp(), 3)
    assert [len(stage.memory.weights) for stage in runner.stages] == [1, 1, 1]
    assert all(
        slot.input is None and not slot.random_state for s in runner.stages for slot in s._slots
    )


def test_a_parameter_in_a_plain_list_is_refused() -> None:
    """In the first backward, where the first graph is."""

    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Parameter(torch.ones(1, dtype=torch.float64))]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.hidden[0]

    model = chain(inner=[Hiding()])
    with refused(AliasedParameterError, "stage 0", "nn.ParameterList"):
        runner_of(model, split=[3], backward_weights="replay").fit(batches(6))


class FailsInTheBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("not twice")
        return x


def test_an_exception_of_the_second_forward_comes_out_and_leaves_no_trace() -> None:
    model = chain(inner=[nn.Dropout(), nn.BatchNorm1d(5), FailsInTheBackward()])
    runner = runner_of(model, split=[5], backward_weights="replay")
    with pytest.raises(RuntimeError, match="not twice") as caught:
        runner.fit(batches(6))
    notes = getattr(caught.value, "__notes__", ["(in the backward of batch 0 at stage 0)"])
    assert "(in the backward of batch 0 at stage 0)" in notes
    model[4] = nn.Identity()
    fresh = runner_of(model, split=[5], backward_weights="replay", lr=0.01)
    assert len(fresh.fit(batches(6)).batch_losses) == 6
