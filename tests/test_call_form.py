"""How inputs are given to the forward of a captured model, and what later ones must have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from captured_models import DictModel, TwoTower, made
from captures import Root, refusal, run
from torch import Tensor

from fdg_cuda.capture import capture
from fdg_cuda.errors import ModelCaptureError

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded")


class Pair(NamedTuple):
    user: Tensor
    item: Tensor


X = torch.linspace(-1, 1, 24).view(4, 6)


def test_lengths_may_differ_where_the_model_allows_it() -> None:
    model, _ = made("gpt")
    chain = capture(model, torch.randint(20, (2, 9)))
    model.eval()
    for length in (3, 20, 32):
        ids = torch.randint(20, (3, length))
        assert torch.equal(run(chain, ids), model(ids))
    with pytest.raises(
        ModelCaptureError, match=r"goes another way .* is True instead of False.*line"
    ):
        run(chain, torch.randint(20, (2, 33)))


def test_lengths_may_not_differ_where_the_code_counts_them() -> None:
    def by_column(self: Any, x: Tensor) -> Tensor:
        return torch.stack([self.first(x)[:, i] * i for i in range(x.shape[1])], dim=1)

    class Any6(Root):
        def forward(self, x: Tensor) -> Tensor:
            return (
                torch.stack([x[:, i] * (i + 1) for i in range(x.shape[1])], 1) * self.first.bias[0]
            )

    model = Any6(by_column)
    chain = capture(model, X)
    with pytest.raises(
        ModelCaptureError, match=r"shape \(4, 5\), but the model was captured for \(\*, 6\)"
    ):
        run(chain, X[:, :5])


def test_inputs_are_given_as_the_forward_takes_them() -> None:
    model, pair = TwoTower(), [torch.randn(5, 6), torch.randn(5, 10)]
    chain = capture(model, tuple(pair))
    assert torch.equal(run(chain, pair), model(*pair))  # a loader makes lists of tuples
    chain = capture(model, {"item": pair[1], "user": pair[0]})
    assert torch.equal(run(chain, {"user": pair[0], "item": pair[1]}), model(*pair))
    batch = {"x": torch.randn(3, 6), "weight": torch.rand(3)}
    chain = capture(DictModel(), batch)
    assert run(chain, batch).keys() == {"classes", "box", "kind"}
    with pytest.raises(
        ModelCaptureError,
        match=r"captured with: \({'x': \*, 'weight': \*, 'more': \*},\) instead of "
        r"\({'x': \*, 'weight': \*},\)$",
    ):
        run(chain, {**batch, "more": torch.rand(3)})


def test_values_that_are_no_arguments_of_the_forward_are_told() -> None:
    model, (user, item) = TwoTower(), (torch.randn(5, 6), torch.randn(5, 10))
    message = refusal(model, {"user": user, "itme": item})
    assert "the dict's keys, user, itme, do not fit its parameters, user, item" in message
    message = refusal(model, (user, item, item))
    assert "the 3 values do not fit its parameters, user, item" in message
    assert "as 3 positional" not in message
    message = refusal(model, Pair(user, item))
    assert "a namedtuple is one; a tuple would be spread over its parameters, user, item" in message
    message = refusal(DictModel(), {"x": user})  # it takes one dict, and that lacks something
    assert "which its forward was given as its one argument: KeyError" in message
    assert "as keyword arguments item, user" in refusal(model, {"user": item, "item": item})
