"""Where any module can be cut, and what is refused of modules, cuts and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured_models import gpt
from residual import Residual, data_of, residual
from torch import Tensor, nn

from fdg_cuda import FDGRunner, ModelCaptureError

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

# -- where to cut ------------------------------------------------------------------------------------


def test_split_points_of_an_nn_sequential_are_its_children() -> None:
    model = nn.Sequential()
    for name in ("stem", "body", "head"):
        model.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    runner = FDGRunner(model, ["cpu"] * 3, split_points=["body", "head"])
    assert (runner.split, runner.split_points) == ([1, 2], ["body", "head"])
    assert FDGRunner(list(model), ["cpu"] * 2, split=[2]).split_points == ["2"]
    for points, words in (
        (["body", "head.0"], r"'head.0' lies inside of 'head'.*nearest is 'head'"),
        (["body", "haed"], r"no child 'haed'.*stem, body, head.*Did you mean 'head'"),
        (["head", "body"], "increase"),
        (["stem", "body"], "between 1 and 2"),
    ):
        with pytest.raises(ValueError, match=words):
            FDGRunner(model, ["cpu"] * 3, split_points=points)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": [3], "split_points": ["blocks.1"]}, "both say where to cut"),
        ({"split": [3, 5]}, r"split must name 1 of the layers.*got \[3, 5\]"),
        ({"split": ["blocks.1"]}, "split must be a list of layer numbers"),
        ({"split_points": []}, r"split_points must name 1 of the layers"),
        ({"split_points": "blocks.1"}, "split_points must be a list of submodules' names"),
        ({"split_points": [3]}, "split_points must be a list of submodules' names"),
    ],
)
def test_cuts_that_cannot_be_meant_are_refused_without_a_sample(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        FDGRunner(Residual(), ["cpu", "cpu"], **options)


@pytest.mark.parametrize("sampled", [False, True], ids=["first-batch", "sample"])
@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Residual, {"split_points": ["block.1"]}, r"no submodule 'block.1'.*blocks.1"),
        (Residual, {"split_points": ["stem"]}, "cannot cut before stem: it begins the model"),
        (Residual, {"split": [100]}, r"cuts must lie between 1 and \d+"),
        (Residual, {"split": [0]}, r"cuts must lie between 1 and \d+"),
    ],
)
def test_cuts_that_the_captured_model_has_not(
    model: Any, options: dict[str, Any], words: str, sampled: bool
) -> None:
    data = data_of(2)
    if sampled:
        with pytest.raises(ModelCaptureError, match=words):
            FDGRunner(model(), ["cpu", "cpu"], sample=data[0][0], **options)
        return
    runner = FDGRunner(model(), ["cpu", "cpu"], **options)
    for _ in range(2):  # not cut elsewhere when it is tried again
        with pytest.raises(ModelCaptureError, match=words):
            runner.fit(data)


class Loop(nn.Module):
    """A loop over two cells, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.cell, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.other(torch.tanh(self.cell(x)))
        return self.last(x)


def test_weights_that_are_used_again_are_never_cut_apart() -> None:
    """By measurement, too: the cuts in between are none."""
    model, ids = gpt(tied=True)
    for points in (["blocks.1"], ["head"]):
        with pytest.raises(
            ModelCaptureError, match=r"words.weight is used in words .* in one stage"
        ):
            FDGRunner(model, ["cpu", "cpu"], split_points=points, sample=ids)
    with pytest.raises(
        ModelCaptureError, match=r"too few for 4 stages: parameter words.weight is used"
    ):
        FDGRunner(model, ["cpu"] * 4, sample=ids)
    x = torch.randn(2, 6)
    looped = "parameter cell.weight is used 3 times, in a loop around cell"
    with pytest.raises(
        ModelCaptureError, match=rf"cannot cut before other: {looped}.*nearest cuts"
    ):
        FDGRunner(Loop(), ["cpu", "cpu"], split_points=["other"], sample=x)
    with pytest.raises(ModelCaptureError, match=rf"3 pieces at most, too few for 4.*{looped}"):
        FDGRunner(Loop(), ["cpu"] * 4, sample=x)
    runner = FDGRunner(Loop(), ["cpu"] * 3, lr=0.05)
    runner.fit(data_of(4))
    assert runner.split_points == ["cell", "last"]


class Keeping(nn.Module):
    """Called in pairs: the second call adds what the first was given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kept is None:
            self.kept = x.detach()
            return x * 1.0
        y, self.kept = x + self.kept, None
        return y


class Sharing(nn.Module):
    """Calls ``shared`` twice."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.shared(self.b(self.shared(self.a(x)))))


def test_a_module_that_keeps_state_is_never_cut_apart() -> None:
    """Two stages would find in it what the other's batch left; torch's own layers keep nothing."""
    words = r"module shared is used .* in one stage"
    with pytest.raises(ModelCaptureError, match=rf"cannot cut before b: {words}"):
        FDGRunner(Sharing(Keeping()), ["cpu"] * 2, split_points=["b"], sample=torch.randn(2, 6))
    runner = FDGRunner(Sharing(Keeping()), ["cpu"] * 2, lr=0.05)
    runner.fit(data_of(3))
    assert runner.split_points == ["c"]
    FDGRunner(Sharing(nn.ReLU()), ["cpu"] * 2, split_points=["b"]).fit(data_of(3))


@pytest.mark.parametrize("inside", [False, True])
def test_layers_that_share_a_module_that_keeps_state_stay_in_one_stage(inside: bool) -> None:
    def layers(shared: nn.Module) -> list[nn.Module]:
        first, second = (nn.Sequential(shared) if inside else shared for _ in range(2))
        return [nn.Linear(6, 6), first, nn.Linear(6, 6), second, nn.Linear(6, 4)]

    with pytest.raises(
        ValueError, match=r"module 1(.0)? \(a Keeping\) is shared by stages 0 and 1"
    ):
        FDGRunner(layers(Keeping()), ["cpu"] * 2, split=[2])
    for shared, split in ((Keeping(), [4]), (nn.ReLU(inplace=True), [2]), (nn.Dropout(), [2])):
        FDGRunner(layers(shared), ["cpu"] * 2, split=split).fit(data_of(3))


# -- what cannot be captured -------------------------------------------------------------------------


def quantized() -> nn.Module:
    model = nn.Linear(6, 2)
    model.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    return model


class OnMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 2), nn.Linear(2, 2, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OnMeta, r"several devices \(a.weight on cpu, b.weight on meta\)"),
        (quantized, "quantized"),
        (lambda: nn.Linear(6, 2, dtype=torch.complex64), "view_as_real"),
        (lambda: nn.LazyLinear(3), "run one batch through the model first"),
        (lambda: nn.DataParallel(nn.Linear(6, 2)), "give model.module"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_without_a_sample(make: Any, words: str) -> None:
    with pytest.raises(ModelCaptureError, match=words):
        FDGRunner(make(), ["cpu"])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            x = -x
        return self.second(x)


def test_control_flow_of_the_models_own_forward_is_refused_with_the_line_and_both_ways_out() -> (
    None
):
    line = Branching.forward.__code__.co_firstlineno + 2
    with pytest.raises(
        ModelCaptureError, match=rf"line {line}, in forward.*submodule.*a list of modules"
    ):
        FDGRunner(Branching(), ["cpu", "cpu"], split_points=["second"]).fit(data_of(2))


def test_inputs_that_do_not_fit() -> None:
    model, data = Residual(), data_of(3)
    with pytest.raises(ModelCaptureError, match=r"could not run on the sample \(\(4, 5\) torch"):
        FDGRunner(model, ["cpu", "cpu"], sample=torch.zeros(4, 5))
    with pytest.raises(TypeError, match="the sample must be a tensor"):
        FDGRunner(model, ["cpu", "cpu"], sample=[1, 2])
    with pytest.raises(TypeError, match="a ModuleDict, has no forward"):
        FDGRunner(nn.ModuleDict({"a": nn.Linear(2, 2)}), ["cpu"])
    runner = residual(2)
    with pytest.raises(ModelCaptureError, match=r"shape \(5, 7\), but .* captured for \(\*, 6\)"):
        runner.fit([*data, (torch.randn(5, 7), data[0][1])])
    runner.fit(data)  # again, behind the error
