"""Stages that compute in bfloat16: torch's numbers under autocast, in every stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import (
    CLASSES,
    FEATURES,
    Batch,
    batches,
    cut,
    even_split,
    largest_difference,
    mlp,
    same_bits,
)
from plain import plain_outputs
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import CheckpointError, Checkpoints, FDGRunner, layer_times, reference
from fdg_cuda.costs import LayerCost
from fdg_cuda.precision import Precision

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

BFLOAT16 = torch.bfloat16


def single(count: int = 9) -> list[Batch]:
    return [(x.float(), y) for x, y in batches(count)]


def network() -> nn.Sequential:
    return mlp().float()


class UnderAutocast(nn.Module):
    """A stage as the oracle gets it."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BFLOAT16, cache_enabled=False):
            output: Tensor = self.layers(x)
        return output


def loss_under_autocast(output: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", BFLOAT16):
        return F.cross_entropy(output, target)


def plainly_trained(model: nn.Sequential, data: list[Batch], epochs: int) -> list[float]:
    """As torch's documentation tells."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for x, y in data * epochs:
        optimizer.zero_grad()
        with torch.autocast("cpu", BFLOAT16):
            loss = F.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("stages", "method"), [(1, "fdg"), (1, "bp"), (2, "bp"), (3, "bp")])
def test_without_delay_it_is_torch_bit_for_bit(stages: int, method: str) -> None:
    model, data = network(), single()
    plain = copy.deepcopy(model)
    split = even_split(8, stages)
    runner = FDGRunner(
        model, ["cpu"] * stages, split=split, method=method, lr=0.05, precision="bfloat16"
    )
    assert runner.precision == "bfloat16"
    losses = runner.fit(data, epochs=2).batch_losses
    assert losses == plainly_trained(plain, data, 2)
    assert largest_difference(model.state_dict(), plain.state_dict()) == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # The same in float32 is something else, or this would show nothing.
    other = network()
    FDGRunner(other, ["cpu"], lr=0.05).fit(data, epochs=2)
    assert largest_difference(model.state_dict(), other.state_dict()) > 1e-3


@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("stages", [2, 3])
def test_agrees_with_the_oracle(stages: int, method: str, backward_weights: str) -> None:
    """Exactly: a beta of 1/2 is exact in every format."""
    model, data, split = network(), single(), even_split(8, stages)
    options: dict[str, Any] = {"method": method, "backward_weights": backward_weights, "lr": 0.05}
    twins = cut(model, split)
    expected = reference.train(
        [UnderAutocast(stage) for stage in twins],
        data,
        epochs=2,
        loss_fn=loss_under_autocast,
        **options,
    )
    runner = FDGRunner(model, ["cpu"] * stages, split=split, precision="bfloat16", **options)
    assert runner.fit(data, epochs=2).batch_losses == expected.losses
    whole = nn.Sequential(*(layer for stage in twins for layer in stage))
    assert largest_difference(model.state_dict(), whole.state_dict()) == 0


class Seen(nn.Module):
    """Keeps the dtypes that pass, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.errors: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes.append(x.dtype)
        if x.requires_grad:
            x.register_hook(lambda error: self.errors.append(error.dtype))
        return x


@pytest.mark.parametrize("backward_weights", ["stash", "replay"])
def test_what_travels_is_half_as_wide(backward_weights: str) -> None:
    seen = Seen()
    layers = [nn.Linear(FEATURES, 8), nn.Linear(8, 8), seen, nn.Linear(8, 8), nn.Linear(8, CLASSES)]
    runner = FDGRunner(
        nn.Sequential(*layers),
        ["cpu"] * 3,
        split=[2, 4],
        lr=0.05,
        precision="bfloat16",
        backward_weights=backward_weights,
    )
    runner.fit(single())
    assert set(seen.dtypes) == set(seen.errors) == {BFLOAT16}


def test_replay_with_dropout_draws_the_mask_of_the_forward() -> None:
    """At lr = 0 all gradients (the momentum sums them up) are those of ``"stash"``, to the bit."""
    torch.manual_seed(2)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 12)]
    for _ in range(4):
        layers += [nn.Dropout(0.3), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, CLASSES))
    runners = []
    for mode in ("stash", "replay"):
        runner = FDGRunner(
            copy.deepcopy(model),
            ["cpu"] * 3,
            split=[6, 12],
            lr=0.0,
            backward_weights=mode,
            precision="bfloat16",
        )
        torch.manual_seed(5)
        runner.fit(single(12))
        runners.append(runner)
    stash, replay = runners
    assert same_bits(stash.state_dict(), replay.state_dict())
    for one, other in zip(stash.stages, replay.stages, strict=True):
        assert one.memory.momentum.abs().sum() > 0
        assert torch.equal(one.memory.momentum, other.memory.momentum)


class Twice(nn.Module):
    """One weight, used by two multiplications whose gradients are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight)


def test_timing_changes_no_bit() -> None:
    """Torch's cache of cast weights is the whole process's, and every stage would empty it."""
    results = []
    for seed in range(4):
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, 8), *(Twice() for _ in range(4)), nn.Linear(8, CLASSES)]
        runner = FDGRunner(
            nn.Sequential(*layers), ["cpu"] * 3, split=[2, 4], lr=0.05, precision="bfloat16"
        )
        runner._machine.injected_delays = (seed, 300 if seed else 0)  # type: ignore[attr-defined]
        runner.fit(single(12))
        results.append(runner.state_dict())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("stages", [1, 3])
def test_evaluation_and_prediction(stages: int) -> None:
    model, data = network(), single(6)
    runner = FDGRunner(model, ["cpu"] * stages, split=even_split(8, stages), precision="bfloat16")
    with torch.autocast("cpu", BFLOAT16):
        expected = plain_outputs(model, data)
        losses = [F.cross_entropy(o, y).item() for o, (_, y) in zip(expected, data, strict=True)]
    assert expected[0].dtype == BFLOAT16
    for found, output in zip(runner.predict_batches(data), expected, strict=True):
        assert torch.equal(found, output)
    assert torch.equal(runner.predict(data[0][0]), expected[0])
    samples = [len(y) for _, y in data]
    mean = sum(loss * n for loss, n in zip(losses, samples, strict=True)) / sum(samples)
    assert runner.evaluate(data).loss == pytest.approx(mean, rel=1e-12)


def test_layers_are_measured_as_they_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    remembered = layer_times.remembered

    def noted(*arguments: Any, **options: Any) -> list[LayerCost]:
        asked.append(options["precision"])
        return remembered(*arguments, **options)

    monkeypatch.setattr("fdg_cuda.machine.remembered", noted)
    seen = Seen()
    model = nn.Sequential(nn.Linear(FEATURES, 8), seen, nn.Linear(8, CLASSES))
    FDGRunner(model, ["cpu"] * 2, precision="bfloat16").fit(single(1))
    assert asked == [Precision.BFLOAT16]
    assert set(seen.dtypes) == {BFLOAT16}


def test_costs_are_remembered_for_each_precision() -> None:
    layers, batch = list(network()), single(1)[0]
    for number, precision in enumerate((Precision.FLOAT32, Precision.BFLOAT16)):
        costs = [LayerCost(number, number)] * 8
        found = layer_times.remembered(
            layers, batch, F.cross_entropy, 1, lambda c=costs: c, precision=precision
        )
        assert found == costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.half])
def test_torchs_dtypes_name_a_precision(dtype: torch.dtype) -> None:
    assert f"torch.{FDGRunner(network(), ['cpu'], precision=dtype).precision}" == str(dtype)


@pytest.mark.parametrize(
    ("given", "meant"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_what_a_short_name_may_have_meant(given: str, meant: str) -> None:
    with refused(ValueError, "precision", repr(given), f"Did you mean {meant!r}?"):
        FDGRunner(network(), ["cpu"], precision=given)


@pytest.mark.parametrize("given", [torch.float64, torch.int8, None, 16], ids=repr)
def test_what_is_no_precision(given: Any) -> None:
    with refused(ValueError, "precision", "float32, bfloat16, float16", repr(given)):
        FDGRunner(network(), ["cpu"], precision=given)


def test_refusals() -> None:
    with refused(ValueError, "precision", "float32, bfloat16", "'half'"):
        FDGRunner(network(), ["cpu"], precision="half")
    with refused(ValueError, "bfloat16", "0.weight", "torch.float64", "model.float()"):
        FDGRunner(mlp(), ["cpu"], precision="bfloat16")
    with (
        torch.autocast("cpu", BFLOAT16),
        refused(RuntimeError, "autocast around fit", "precision='bfloat16'"),
    ):
        FDGRunner(network(), ["cpu"]).fit(single(1))


def test_a_checkpoint_of_another_precision(tmp_path: Path) -> None:
    FDGRunner(network(), ["cpu"], lr=0.05).fit(single(3), checkpoints=tmp_path)
    other = FDGRunner(network(), ["cpu"], lr=0.05, precision="bfloat16")
    with pytest.raises(CheckpointError, match=r"precision was 'float32' and is 'bfloat16' now"):
        other.fit(single(3), 2, checkpoints=Checkpoints(tmp_path, resume=True))
