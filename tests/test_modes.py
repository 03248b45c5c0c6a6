"""Training and evaluation mode, as a whole and in part."""

from __future__ import annotations

import copy

import pytest
from chains import batches, same_bits
from refusals import SPLITS, WIDTH, agrees_with_oracle, chain, runner_of
from torch import nn

from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_in_evaluation_mode_stays_as_it_is(method: str) -> None:
    """Frozen statistics in one stage, moving ones in the other."""
    frozen, moving = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
    model = chain(inner=[frozen, nn.Linear(WIDTH, WIDTH), moving])
    frozen.running_mean.uniform_(-1, 1)
    frozen.eval()
    before = copy.deepcopy(dict(frozen.named_buffers()))
    agrees_with_oracle(model, [3], method=method)
    assert same_bits(dict(frozen.named_buffers()), before)
    assert int(moving.num_batches_tracked) == 6
    assert not frozen.training
    assert moving.training
    assert model.training


@pytest.mark.parametrize("split", SPLITS)
def test_model_in_evaluation_mode_is_trained(split: list[int] | None) -> None:
    model, twin = chain(inner=[nn.BatchNorm1d(WIDTH)]), chain(inner=[nn.BatchNorm1d(WIDTH)])
    model.eval()
    runner = runner_of(model, split=split)
    runner.fit(batches(4))
    assert all(module.training for module in model.modules())
    runner_of(twin, split=runner.split).fit(batches(4))
    assert same_bits(model.state_dict(), twin.state_dict())
