"""Inputs and targets nested in tuples, lists and dicts train as plain tensors do."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from chains import FEATURES, batches, compare, even_split, mlp, oracle, same_bits
from nests import KINDS, Take, nested, taking_apart
from refusals import refused
from torch import nn
from torch.nn import functional as F
from versions import TOLERANCE, runner_of, state

from fdg_cuda.forms import ALIGNMENT, NestedForm, extent, fill
from fdg_cuda.nested import cloned, tensors
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

X, Y = torch.zeros(2, FEATURES, dtype=torch.float64), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_oracle(kind: str, stages: int) -> None:
    model, data, loss = nested(kind, batches(7))
    difference = compare(model, even_split(9, stages), data, epochs=2, lr=0.05, loss_fn=loss)
    assert difference < TOLERANCE


@pytest.mark.parametrize("stages", [1, 2])
def test_a_loss_that_takes_its_target_apart(stages: int) -> None:
    plain, model = mlp(), mlp()
    expected = runner_of(plain, stages).fit(batches(5), epochs=2)
    found = runner_of(
        model, stages, loss_fn=lambda output, target: F.cross_entropy(output, taking_apart(target))
    ).fit([(x, {"labels": y}) for x, y in batches(5)], epochs=2)
    assert same_bits(state(model), state(plain))
    assert found.batch_losses == expected.batch_losses
    for one, other in zip(found.epochs, expected.epochs, strict=True):
        assert (one.samples, one.loss) == (other.samples, other.loss)


@pytest.mark.parametrize("method", METHODS)
def test_gives_the_bits_of_plain_batches_whatever_the_timing(method: str) -> None:
    plain, model = mlp(), nn.Sequential(Take(lambda x: torch.cat(x, dim=1) / 2), *mlp())
    runner_of(plain, 3, method=method, split=[2, 5]).fit(batches(9), epochs=2)
    runner = runner_of(model, 3, method=method, split=[3, 6])
    runner._machine.injected_delays = (3, 300)  # type: ignore[attr-defined]
    runner.fit([((x[:, :3], x[:, 3:]), y) for x, y in batches(9)], epochs=2)
    assert same_bits(nn.Sequential(*model[1:]).state_dict(), state(plain))


@pytest.mark.parametrize("stages", [1, 3])
def test_the_oracle_itself(stages: int) -> None:
    """Nested batches give it the numbers of the plain ones, to the bit."""
    model = nn.Sequential(Take(lambda x: torch.cat([x["a"][0], x["b"]], dim=1) / 2), *mlp())
    data = batches(5)
    split = even_split(8, stages)
    _, plain = oracle(mlp(), split, data)
    _, found = oracle(
        model,
        [index + 1 for index in split],
        [({"a": (x[:, :3], 1), "b": x[:, 3:]}, [y]) for x, y in data],
        loss_fn=lambda output, target: F.cross_entropy(output, target[0]),
    )
    assert found.losses == plain.losses
    with pytest.raises(TypeError, match="nested or not"):
        oracle(model, split, [({"a": 1}, data[0][1])])


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_loader_gave_is_left_alone(kind: str) -> None:
    """Though the first layer takes containers apart, and one works in place. Measuring where to cut
    sees nested inputs too."""
    model, data, loss = nested(kind, batches(3))
    before = repr(copy.deepcopy(data))
    runner = runner_of(model, 2, split=None, loss_fn=loss)
    history = runner.fit(data)
    assert len(history.batch_losses) == 3
    runner.evaluate(data)
    runner.predict(data[0][0])
    assert repr(data) == before


@pytest.mark.parametrize("stages", [1, 2])
def test_a_loader_may_refill_its_tensors(stages: int) -> None:
    model, data, loss = nested("dict", batches(6, last=None))
    twin = copy.deepcopy(model)
    x, y = cloned(data[0])

    def refilling() -> Any:
        for value in data:
            for mine, new in zip(tensors((x, y)), tensors(value), strict=True):
                mine.copy_(new)
            yield x, y

    split = even_split(9, stages)
    expected = runner_of(model, stages, split=split, loss_fn=loss).fit(data).batch_losses
    assert runner_of(twin, stages, split=split, loss_fn=loss).fit(refilling()).batch_losses == (
        expected
    )
    assert same_bits(state(model), state(twin))


def test_accuracy_only_where_the_target_is_one_tensor() -> None:
    model, data, loss = nested("dict", batches(3))
    assert runner_of(model, loss_fn=loss, split=[4]).fit(data).epochs[0].accuracy is not None
    model, data, loss = nested("tuples", batches(3))
    runner = runner_of(model, loss_fn=loss, split=[4])
    assert runner.fit(data).epochs[0].accuracy is None
    assert runner.evaluate(data).accuracy is None


BAD: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "lengths": (({"a": X}, (Y[:1],)), ValueError, ["2 samples", "target 1", "first tensor"]),
    "no samples": (((X[:0], X), Y), ValueError, ["input", "no samples", "(0, 6), (2, 6)"]),
    "scalars": ((X, {"y": Y[0]}), ValueError, ["target", "no samples"]),
    "no tensor": (({"a": 1}, Y), TypeError, ["input", "dict", "without any tensor"]),
    "empty": (((), Y), TypeError, ["input", "tuple", "without any tensor"]),
    "None": ((X, None), TypeError, ["target", "NoneType", "without any tensor"]),
    "array": (({"a": X, "b": X.numpy()}, Y), TypeError, ["input", "ndarray", "torch.as_tensor"]),
    "mapping": ((UserDict(a=X), Y), TypeError, ["input", "UserDict", "dict(batch)", "collate_fn"]),
    "object": ((X, [Y, object()]), TypeError, ["target", "object", "register_pytree_node"]),
}


@pytest.mark.parametrize("split", [[2], None], ids=["given-split", "measured-split"])
@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_taken_in(kind: str, split: list[int] | None) -> None:
    item, error, words = BAD[kind]
    model = mlp()
    runner = runner_of(model, split=split)
    for use in (runner.fit, runner.evaluate):
        with refused(error, "batch 0", *words, model=model):
            use([item])


def test_the_tensors_of_a_batch_lie_aligned_in_one_piece_of_memory() -> None:
    value = {
        "ids": torch.arange(6).reshape(2, 3),
        "more": [
            (torch.ones(2, dtype=torch.bool), 1.5),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        ],
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "none": torch.empty(2, 0),
        "text": ("a", None),
    }
    form = NestedForm.of(value)
    assert [offset for offset, _ in form.parts] == [0, 256, 512, 1024, 1280]
    assert all(offset % ALIGNMENT == 0 for offset, _ in form.parts)
    assert form.nbytes == 1281  # at least 1 for each
    memory = torch.zeros(form.nbytes, dtype=torch.uint8)
    fill(form, memory, value)
    found = form.view(memory)
    assert extent(found) == (memory.data_ptr(), form.nbytes)
    assert str(found) == str(value)
    assert NestedForm.of(found) == form
    # What a captured graph has baked in is part of the form.
    other = cloned(value)
    other["more"][0] = (other["more"][0][0], 2.5)
    assert NestedForm.of(other) != form
    assert NestedForm.of({**value, "text": ("a", False)}) != form
