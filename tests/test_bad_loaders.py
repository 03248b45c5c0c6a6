"""Loaders that give what cannot be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from chains import FEATURES, batches, same_bits
from refusals import SPLITS, Data, chain, refused, runner_of

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


X, Y = torch.zeros(2, FEATURES, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
BAD_LOADERS: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "None": (None, TypeError, ["pairs (input, target)", "NoneType"]),
    "not iterable": (5, TypeError, ["pairs (input, target)", "int"]),
    "empty": ([], ValueError, ["no batch", "drop_last"]),
    "empty generator": ((b for b in ()), ValueError, ["no batch"]),
    "tensors": ([X, X], TypeError, ["batch 0", "pairs (input, target)", "Tensor"]),
    "triples": ([(X, Y, Y)], TypeError, ["batch 0", "pairs (input, target)", "tuple of 3"]),
    "dicts": ([{"x": X, "y": Y}], TypeError, ["batch 0", "pairs (input, target)", "dict"]),
    "arrays": ([(X.numpy(), Y)], TypeError, ["batch 0", "input", "ndarray", "torch.as_tensor"]),
    "lists": ([(X, [0, 0])], TypeError, ["batch 0", "target", "list", "torch.as_tensor"]),
    "lengths": ([(X, Y[:1])], ValueError, ["batch 0", "2 samples", "target 1"]),
    "no samples": ([(X[:0], Y[:0])], ValueError, ["batch 0", "input", "no samples"]),
    "scalar target": ([(X, Y[0])], ValueError, ["batch 0", "target", "no samples"]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", BAD_LOADERS)
def test_loader_that_gives_no_pairs(kind: str, split: list[int] | None) -> None:
    loader, error, words = BAD_LOADERS[kind]
    model = chain()
    runner = runner_of(model, split=split)
    with refused(error, *words, model=model):
        runner.fit(loader)
    with refused(error, *words, model=model):
        runner.evaluate(loader)
    runner.fit(batches(2))


@pytest.mark.parametrize("bad", [(X, Y[:1]), X, (X, None)], ids=["lengths", "no pair", "no target"])
def test_loader_that_goes_bad_in_the_middle(bad: Any) -> None:
    runner = runner_of(chain(), split=[2])
    with refused((TypeError, ValueError), "batch 3"):
        runner.fit([*batches(3), bad, *batches(3)])
    runner.fit(batches(2))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "once", [iter, lambda data: (b for b in data), lambda data: map(tuple, data)], ids=str
)
def test_one_shot_loader(once: Callable[[Data], Iterator[Any]], split: list[int] | None) -> None:
    """Refused for two epochs before anything is trained; for one epoch no batch is lost."""
    data = batches(4)
    model = chain()
    runner = runner_of(model, split=split)
    with refused(TypeError, "one-shot", "2 epochs", "DataLoader", model=model):
        runner.fit(once(data), epochs=2)
    losses = runner.fit(once(data)).batch_losses
    assert len(losses) == 4
    twin = chain()
    assert losses == runner_of(twin, split=runner.split).fit(data).batch_losses
    assert same_bits(model.state_dict(), twin.state_dict())


def test_loader_that_is_used_up_after_an_epoch() -> None:
    """It pretends to be iterable again. The first epoch's work is kept."""

    class Once:
        def __init__(self) -> None:
            self.left = batches(4)

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop(0)

    model, twin = chain(), chain()
    with refused(ValueError, "no batch"):
        runner_of(model, split=[2]).fit(Once(), epochs=3)
    runner_of(twin, split=[2]).fit(batches(4))
    assert same_bits(model.state_dict(), twin.state_dict())


def test_predict_takes_tensors_only() -> None:
    with refused(TypeError, "tensor", "list"):
        runner_of(chain()).predict([[0.0] * FEATURES])  # type: ignore[arg-type]
