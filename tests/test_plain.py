"""Values of state dictionaries through JSON and back."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fdg_cuda.plain import from_plain, to_plain


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0.1,
        [1, (2, [3.5, None])],
        {1: "a", 2.5: "b"},
        {"a": {"__fdg_cuda__": "tuple"}},
        Counter({30: 2, 80: 1}),
    ],
)
def test_comes_back_as_it_was(value: Any) -> None:
    back = from_plain(json.loads(json.dumps(to_plain(value, "here"))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        ({np.int64(3): np.bool_(False)}, {3: False}),
    ],
    ids=repr,
)
def test_other_numbers_become_plain_ones(value: Any, expected: Any) -> None:
    plain = from_plain(json.loads(json.dumps(to_plain(value, "here"))))
    assert plain == expected
    assert type(plain) is type(expected)


def test_what_json_cannot_hold_is_named_with_its_place() -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a set"):
        to_plain({"a": [1, {2}]}, "state")


@pytest.mark.parametrize("value", [np.longdouble(0.1), np.complex64(1j), np.datetime64("2020")])
def test_numbers_of_numpy_that_no_plain_one_is_like(value: Any) -> None:
    with pytest.raises(TypeError, match="state is a"):
        to_plain(value, "state")
