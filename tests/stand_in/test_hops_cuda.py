"""Several tensors between two stages on the stand-in: packed, copied at once, eagerly and as graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import batches, largest_difference, oracle
from hopping import FANS, Fan, fanned, hopping, joined, own_names
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner
from fdg_cuda.accelerator import accelerator
from fdg_cuda.cuda_stage import CudaStage

TOLERANCE = 1e-10
SPLITS = {2: [2], 3: [2, 3], 4: [1, 3, 4]}
GRAPHS = pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])


def captures() -> int:
    stand_in: Any = accelerator()
    return int(stand_in.captures)


@GRAPHS
@pytest.mark.parametrize(("stages", "method"), [(2, "ddg"), (3, "fdg"), (3, "bp"), (4, "fdg")])
def test_agrees_with_the_oracle_of_the_joined_chain(stages: int, method: str, graphs: bool) -> None:
    model, split, data = hopping(), SPLITS[stages], batches(7)
    expected, recorded = oracle(joined(model), split, data, epochs=2, method=method, lr=0.05)
    runner = FDGRunner(
        model, [0, 1, 0, 2][:stages], split=split, method=method, lr=0.05, graphs=graphs
    )
    runner._machine.stage_every_hop = stages == 4  # type: ignore[attr-defined]
    losses = runner.fit(data, epochs=2).batch_losses
    assert losses == pytest.approx(recorded.losses, rel=TOLERANCE)
    assert largest_difference(runner.state_dict(), own_names(expected)) < TOLERANCE
    assert (captures() > 0) == graphs


def as_on_the_cpu(make: Any, split: list[int], **options: Any) -> list[FDGRunner]:
    """The runners that were compared, that of the CPU last."""
    runners, losses = [], []
    for device, only_here in ((0, options), ("cpu", {})):
        runner = FDGRunner(make(), [device] * (len(split) + 1), split=split, lr=0.05, **only_here)
        losses.append(runner.fit(batches(6), epochs=2).batch_losses)
        runners.append(runner)
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    states = [runner.state_dict() for runner in runners]
    assert largest_difference(*states) < TOLERANCE
    return runners


@pytest.mark.parametrize("name", FANS)
def test_tensors_that_have_something_in_common(name: str) -> None:
    as_on_the_cpu(lambda: fanned(name), [2, 3], graphs="auto")
    assert captures() > 0


@pytest.mark.parametrize("name", ["the same twice", "not used", "empty"])
def test_the_same_without_graphs(name: str) -> None:
    as_on_the_cpu(lambda: fanned(name), [2, 3], graphs=False)


def test_replay_with_packed_inputs() -> None:
    runners = []
    for device in (0, "cpu"):
        runner = FDGRunner(hopping(), [device] * 3, split=[2, 3], backward_weights="replay")
        runner.fit(batches(7))
        runners.append(runner)
    assert largest_difference(*(runner.state_dict() for runner in runners)) < TOLERANCE


class Fickle(nn.Module):
    """Uses the one or the other tensor, in turns, so that error signals of another pattern, but of the
    same number of bytes, come from it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 5), nn.Linear(5, 5)
        self.calls = 0
        self.register_forward_hook(lambda *_: None)  # so no graph is captured

    def forward(self, hop: Any) -> Tensor:
        self.calls += 1
        left, right = hop
        if self.calls % 3 == 0:
            return self.left(left) + self.right(right)  # type: ignore[no-any-return]
        return self.left(left) if self.calls % 3 == 1 else self.right(right)  # type: ignore[no-any-return]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.left(x).tanh(), self.right(x).tanh()


@pytest.mark.parametrize("in_between", [False, True])
def test_error_signals_that_come_and_go(in_between: bool, stand_in: Any) -> None:
    """The graphs below were captured for others: a backward that fits none runs eagerly, on what the
    forward's graph left."""

    class HandOn(nn.Module):
        def forward(self, hop: Any) -> Any:
            return tuple(tensor * 2 for tensor in hop)

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layers: list[nn.Module] = [Two(), Fickle(), nn.Linear(5, 4)]
        return nn.Sequential(*layers[:1], *[HandOn()] * in_between, *layers[1:]).double()

    as_on_the_cpu(make, [1, 2] if in_between else [1], graphs="auto")
    assert stand_in.calls_of["cudaGraphLaunch"] > 0


@GRAPHS
def test_the_output_may_be_a_dict(graphs: bool) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.size = nn.Linear(5, 4), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"classes": self.classes(x), "size": [self.size(x), None]}

    def loss(output: Any, target: Tensor) -> Tensor:
        size, _ = output.pop("size")
        return F.cross_entropy(output.pop("classes"), target) + size.square().mean()

    runners = []
    for devices, here in (([0, 1], {"graphs": graphs}), (["cpu", "cpu"], {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Heads()).double()
        runner = FDGRunner(model, devices, split=[1], loss_fn=loss, lr=0.05, **here)
        assert runner.fit(batches(5)).epochs[0].accuracy is None
        runners.append(runner)
    ours, expected = (
        [r.predict(batches(1)[0][0]), *r.predict_batches(batches(3))] for r in runners
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one["classes"], other["classes"])
        torch.testing.assert_close(one["size"][0], other["size"][0])
        assert one["size"][1] is None
    assert runners[0].evaluate(batches(3)).loss == pytest.approx(
        runners[1].evaluate(batches(3)).loss, rel=TOLERANCE
    )


@GRAPHS
def test_a_part_of_a_target_may_be_changed_in_place(graphs: bool) -> None:
    """Another part, of the same piece of memory, is needed in the backward."""

    def loss(output: Tensor, target: Any) -> Tensor:
        factor, other = target
        product = (output * factor).mean()
        return product + other.mul_(2).mean()

    data = [(x, (x[:, :4].clone(), x[:, 2:].clone())) for x, _ in batches(4)]
    runners = []
    for devices, here in (([0, 1], {"graphs": graphs}), (["cpu", "cpu"], {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
        runners.append(FDGRunner(model, devices, split=[1], loss_fn=loss, lr=0.05, **here))
        runners[-1].fit(data)
    assert largest_difference(*(runner.state_dict() for runner in runners)) < TOLERANCE


def test_a_view_that_was_handed_through_cannot_be_changed_in_place() -> None:
    """It arrives packed, as memory of its own."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 5), Fan(lambda x: (x, x[:, :2]))),
        Fan(lambda hop: hop),
        nn.Sequential(Fan(lambda hop: hop[0].mul_(2) + hop[1].sum()), nn.Linear(5, 4)),
    ).double()
    runner = FDGRunner(model, [0, 0, 0], split=[1, 2], graphs=False)
    with pytest.raises(RuntimeError, match=r"stage 2 .* shares its memory .* from stage 1"):
        runner.fit(batches(3))


@pytest.mark.parametrize("way", ["up", "down"])
def test_what_was_packed_is_kept_until_it_was_sent(
    way: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_up, pass_down = CudaStage._pass_up, CudaStage._pass_down

    def up(self: CudaStage, slot: int, batch: int, output: Any) -> None:
        pass_up(self, slot, batch, output)
        self.mail.outputs[slot] = None

    def down(self: CudaStage, batch: int, leaves: list[Tensor]) -> None:
        pass_down(self, batch, leaves)
        self.mail.error = None

    monkeypatch.setattr(CudaStage, f"_pass_{way}", up if way == "up" else down)
    FDGRunner(hopping(), [0, 0], split=[2], graphs=False).fit(batches(4))
    violations = list(stand_in.violations)
    stand_in.reset()
    assert any("given back" in text for text in violations)
