"""What tests of captured chains share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from fdg_cuda.capture import capture
from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.graph_chain import GraphChain


class Root(nn.Module):
    """The test's function is the model's own forward."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def run(chain: GraphChain, value: Any, cuts: Any = None) -> Any:
    for stage in chain.stages(chain.allowed_cuts() if cuts is None else cuts):
        value = stage(value)
    return value


def refusal(model: Any, sample: Any) -> str:
    with pytest.raises(ModelCaptureError) as caught:
        capture(model, sample)
    return str(caught.value)
