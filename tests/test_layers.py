"""Layers that are out of the ordinary: refused, or trained like anywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, batches, largest_difference, oracle
from refusals import SPLITS, TOLERANCE, WIDTH, agrees_with_oracle, chain, refused, runner_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fdg_cuda import AliasedParameterError
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x)


@pytest.mark.parametrize(
    ("at", "split"), [(2, [3]), (5, [3]), (5, None)], ids=["before-a-cut", "last", "last-measured"]
)
def test_layer_that_returns_what_cannot_be_taken_apart(at: int, split: list[int] | None) -> None:
    for wrap, words in (
        (lambda x: object(), "returned a object"),
        (lambda x: (x, object()), "returned a tuple with a object in it"),
        (lambda x: [len(x)], "returned a list without any tensor"),
    ):
        model = chain()
        model.insert(at, Wrapped(wrap))
        with refused(
            TypeError, words, "one tensor, or tuples", "register_pytree_node", model=model
        ):
            runner_of(model, split=split).fit(batches(3))


def test_tuple_between_two_layers_of_a_stage() -> None:
    """The next layer's own complaint comes out."""
    for split in ([2], None):
        with refused(TypeError, "linear()", "tuple"):
            runner_of(chain(inner=[nn.Tanh(), Pair()]), split=split).fit(batches(3))


def detached(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target).detach()


def without_graph(output: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(output, target)


BAD_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[Exception], list[str]]] = {
    "vector": (lambda o, y: F.cross_entropy(o, y, reduction="none"), TypeError, ["scalar", "(8,)"]),
    "float": (lambda o, y: F.cross_entropy(o, y).item(), TypeError, ["scalar", "float"]),
    "None": (lambda o, y: None, TypeError, ["scalar", "NoneType"]),
    "tuple": (lambda o, y: (F.cross_entropy(o, y), o), TypeError, ["scalar", "tuple"]),
    "detached": (detached, ValueError, ["batch 0", "no trainable parameter", "detached"]),
    "no_grad": (without_graph, ValueError, ["batch 0", "no trainable parameter", "no_grad"]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_loss_that_cannot_be_trained(
    kind: str, split: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times measured with such a loss are not remembered either: they lack the backward."""
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fdg_cuda.layer_times._known", {})
    loss_fn, error, words = BAD_LOSSES[kind]
    model = chain()
    with refused(error, *words, model=model):
        runner_of(model, split=split, loss_fn=loss_fn).fit(batches(3))
    assert list(tmp_path.iterdir()) == []


def test_detached_output() -> None:
    class Detach(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    model = nn.Sequential(*chain(), Detach())
    with refused(ValueError, "batch 0", "detached", model=model):
        runner_of(model, split=[2]).fit(batches(3))


def test_loss_of_one_element() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target).reshape(1)

    agrees_with_oracle(chain(), [2], loss_fn=loss)


def in_place(first: list[nn.Module]) -> nn.Sequential:
    """In-place layers first of all, and behind each of the cuts [2, 4]."""
    linear = [nn.Linear(a, b) for a, b in ((FEATURES, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES))]
    layers = [*first, linear[0], nn.ReLU(inplace=True), linear[1], nn.ELU(inplace=True), linear[2]]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
def test_in_place_layer_behind_a_cut(method: str, backward_weights: str) -> None:
    data = batches(6)
    before = [x.clone() for x, _ in data]
    model = in_place([nn.LeakyReLU(0.5, inplace=True)])
    agrees_with_oracle(model, [2, 4], data, method=method, backward_weights=backward_weights)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before, strict=True))


@pytest.mark.parametrize("split", [[1, 4], [3, 5], None], ids=str)
def test_in_place_layer_on_a_view_of_the_input(split: list[int] | None) -> None:
    data = batches(6)
    before = [x.clone() for x, _ in data]
    model = in_place([nn.Flatten(), nn.LeakyReLU(0.5, inplace=True)])
    runner = runner_of(copy.deepcopy(model), 3, split=split)
    runner.fit(data)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before, strict=True))
    assert runner.split is not None
    agrees_with_oracle(model, runner.split, data)


def test_evaluate_and_predict_leave_the_input_to_an_in_place_layer() -> None:
    """A list is a loader: a second evaluation must find what the first one found."""
    data = batches(2)
    before = [x.clone() for x, _ in data]
    runner = runner_of(in_place([nn.LeakyReLU(0.5, inplace=True)]), split=[2])
    first = runner.evaluate(data)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before, strict=True))
    assert runner.evaluate(data) == first
    runner.predict(data[0][0])
    assert torch.equal(data[0][0], before[0])


def test_input_that_requires_grad_gets_none() -> None:
    data = [(x.requires_grad_(), y) for x, y in batches(4)]
    runner_of(chain(), split=[2]).fit(data)
    assert all(x.grad is None and x.requires_grad for x, _ in data)


class Reaching(nn.Module):
    """Multiplies by parameters it keeps in a plain Python list."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        self.hidden = list(parameters)

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.hidden:
            x = x @ parameter
        return x


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("split", [[1], [3]], ids=["in-its-stage", "in-the-other-stage"])
def test_registered_parameter_reached_through_a_list(split: list[int], order: str) -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    inner = [Reaching(linear.weight), nn.Tanh(), linear]
    model = chain(inner=inner if order == "before" else inner[::-1])
    with refused(AliasedParameterError, "(5, 5)", "list", "registers it", "nn.ParameterList"):
        runner_of(model, split=split).fit(batches(5))


def test_unregistered_parameter_reached_through_a_list() -> None:
    """It would never be trained: ``model.parameters()`` does not know it."""
    hidden = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64))
    model = chain(inner=[Reaching(hidden)])
    with refused(AliasedParameterError, "(5, 5)", "nn.ParameterList"):
        runner_of(model, split=[2]).fit(batches(5))


def test_parameter_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights[0] @ self.weights[1]

    agrees_with_oracle(chain(inner=[Listed()]), [2])


class LastOutput(nn.Module):
    """A recurrent layer that passes on its last output only."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0][:, -1]
        return output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_wrapped_recurrent_layer(kind: type[nn.RNNBase], method: str) -> None:
    torch.manual_seed(0)
    layer = kind(input_size=3, hidden_size=WIDTH, batch_first=True)
    model = nn.Sequential(
        LastOutput(layer), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    ).double()
    data = [
        (torch.randn(5, 3, 3, dtype=torch.float64), torch.randint(CLASSES, (5,))) for _ in range(5)
    ]
    agrees_with_oracle(model, [1, 3], data, method=method)
    own = dict(layer.named_parameters())
    assert all(
        weight is own[name]
        for weight, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", ["stash", "replay"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_layer(method: str, mode: str, reentrant: bool) -> None:
    """Its backward runs the forward again, which must find the weights of the batch's forward (or of
    the moment)."""

    class Block(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            if not self.checkpointed:
                return self.layers(x)  # type: ignore[no-any-return]
            return checkpoint(self.layers, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    plain, model = chain(inner=[Block(False)]), chain(inner=[Block(True)])
    plain.load_state_dict(model.state_dict())
    options = {"lr": 0.1, "method": method, "backward_weights": mode}
    expected, _ = oracle(plain, [3], batches(6), **options)
    runner_of(model, split=[3], **options).fit(batches(6))
    assert largest_difference(model.state_dict(), expected) < TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
def test_buffer_that_is_assigned_anew(split: list[int] | None) -> None:
    """A running mean kept without in-place operations; measuring must leave no trace in it."""

    class RunningMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    model = chain(inner=[RunningMean(), nn.Tanh()])
    runner = runner_of(copy.deepcopy(model), split=split, lr=0.1)
    runner.fit(batches(6))
    assert runner.split is not None
    expected, _ = oracle(model, runner.split, batches(6), lr=0.1)
    assert largest_difference(runner.state_dict(), expected) < TOLERANCE
