"""FDGRunner takes any module: captured, cut, trained, evaluated and gone on with under its own names."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_models import FAMILIES, OTHERS, Gpt, made
from chains import same_bits
from crashes import Crash, CrashError
from residual import Residual, data_of, residual
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fdg_cuda import CheckpointError, Checkpoints, FDGRunner, ModelCaptureError
from fdg_cuda.batches import Batches
from fdg_cuda.nested import map_tensors, sample_count, tensors

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

# The error signal of a permuted tensor has its layout, so that sums over it round differently.
ROUNDED = ("convnext",)
HYPER: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


class Scaled(nn.Module):
    def __init__(self, block: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("own", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.own


def without_dropout(model: nn.Module) -> nn.Module:
    """Stages draw from generators of their own, other numbers than the plain model."""
    for module in model.modules():
        for name in ("p", "drop_rate", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def call(model: nn.Module, x: Any) -> Any:
    """By hand what a runner finds out: a dict is the keyword arguments of a forward that has several,
    a tuple its positional ones."""
    if isinstance(x, tuple):
        return model(*x)
    return model(**x) if isinstance(x, dict) and not hasattr(model, "trunk") else model(x)


def trained_plainly(model: nn.Module, data: list[Any], loss_fn: Any) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), **HYPER)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_fn(call(model, x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def evenly_cut(model: nn.Module, sample: Any, stages: int, **options: Any) -> FDGRunner:
    runner = FDGRunner(model, ["cpu"] * stages, sample=sample, **options)
    staged: Any = runner._staged
    staged._cut([staged.chain.pieces * k // stages for k in range(1, stages)])
    return runner


def assert_alike(found: nn.Module, expected: nn.Module, *, exactly: bool) -> None:
    close = torch.equal if exactly else partial(torch.allclose, rtol=1e-4, atol=1e-5)
    theirs = expected.state_dict()
    for key, value in found.state_dict().items():
        assert close(value, theirs[key]), key


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        *((n, 2 + number % 3) for number, n in enumerate(FAMILIES) if n != "wide_resnet"),
        *(("resnet", stages) for stages in (2, 3, 4) if stages != 2 + 1 % 3),
    ],
)
def test_trains_and_predicts_as_the_plain_model(name: str, stages: int) -> None:
    """bp, so that its updates are plain training's, to the bit."""
    model, x = made(name)
    without_dropout(model)
    twin = copy.deepcopy(model)
    data = [(torch.randn(n, *x.shape[1:]), torch.randint(0, 10, (n,))) for n in (3, 2)]
    runner = evenly_cut(model, data[0][0], stages, method="bp", **HYPER)
    with torch.no_grad():
        assert torch.equal(runner.predict(x), twin.eval()(x))
    losses = runner.fit(data).batch_losses
    expected = trained_plainly(twin.train(), data, F.cross_entropy)
    assert losses == expected if name not in ROUNDED else losses == pytest.approx(expected)
    assert_alike(model, twin, exactly=name not in ROUNDED)
    assert model.training


def weighted(output: Any, target: Tensor) -> Tensor:
    """A loss for outputs of any kind, in which every number of theirs has another part."""
    parts = [
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum()
        for t in tensors(output)
    ]
    return torch.stack(parts).sum() / 10


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("name", OTHERS)
def test_inputs_outputs_and_hops_of_several_tensors(name: str, stages: int) -> None:
    """Skips as long as the model, a mask that goes along, two inputs, states and dicts that come out."""
    model, x = made(name)
    without_dropout(model)
    twin = copy.deepcopy(model)
    data = [(x, torch.zeros(sample_count(x)))] * 3
    runner = evenly_cut(model, x, stages, method="bp", loss_fn=weighted, **HYPER)
    with torch.no_grad():
        assert_same(runner.predict(x), call(twin.eval(), x))
        for output in runner.predict_batches([(x, None)] * 2):
            assert_same(output, call(twin, x))
    expected = trained_plainly(twin.train(), data, weighted)
    assert runner.fit(data).batch_losses == expected
    assert_alike(model, twin, exactly=True)
    assert runner.evaluate(data).samples == 3 * sample_count(x)


def assert_same(one: Any, other: Any) -> None:
    assert all(map(torch.equal, tensors(one), tensors(other)))
    assert repr(map_tensors(lambda t: None, one)) == repr(map_tensors(lambda t: None, other))


@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("name", ["unet", "masked encoder"])
def test_delayed_gradients_of_several_tensors(name: str, method: str) -> None:
    """At lr = 0 a stage's momentum after one batch is its gradient, shrunk as far as it is delayed."""
    model, x = made(name)
    without_dropout(model)
    weighted(call(model, x), x).backward()
    gradients = {p: p.grad for p in model.parameters()}
    model.zero_grad()
    options = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "beta": 0.5}
    runner = evenly_cut(model, x, 3, method=method, loss_fn=weighted, **options)
    runner.fit([(x, torch.zeros(sample_count(x)))])
    seen = 0
    for stage in runner.stages:
        for parameter, state in stage.optimizer_state().items():
            shrunk = gradients[parameter] * 0.5 ** (2 - stage.index)
            assert torch.equal(state["momentum_buffer"], shrunk)
            seen += 1
    assert seen == len(gradients)


@pytest.mark.parametrize(
    ("method", "weights"), [("fdg", "stash"), ("fdg", "replay"), ("ddg", "current")]
)
def test_delayed_gradients_are_those_of_stages_cut_by_hand(method: str, weights: str) -> None:
    """Random numbers included: a stage draws the same, whatever it consists of."""
    model, data = Residual(), data_of()
    twin: Any = copy.deepcopy(model)
    blocks = [Scaled(block, twin.scale) for block in twin.blocks]
    by_hand = [nn.Sequential(twin.stem, blocks[0]), blocks[1], nn.Sequential(blocks[2], twin.head)]
    options: dict[str, Any] = {"method": method, "backward_weights": weights, "lr": 0.05}
    one = FDGRunner(model, ["cpu"] * 3, split_points=["blocks.1", "blocks.2"], **options)
    other = FDGRunner(by_hand, ["cpu"] * 3, split=[1, 2], **options)
    assert one.fit(data, epochs=2).batch_losses == other.fit(data, epochs=2).batch_losses
    assert_alike(model, twin, exactly=True)
    assert one.evaluate(data) == other.evaluate(data)


# -- before and behind the capture -------------------------------------------------------------------


def test_without_a_sample_the_first_batch_is_captured() -> None:
    model, data = Residual(), data_of()
    keys = list(model.state_dict())
    runner = FDGRunner(model, ["cpu", "cpu"], split_points=["blocks.1"], lr=0.05)
    assert (runner.split, runner.split_points, runner.stages) == (None, None, [])
    outputs = [torch.equal(runner.predict(x), model.eval()(x)) for x, _ in data]
    before = runner.evaluate(data)
    model.train()
    runner.fit(data, epochs=0)
    assert runner.stages == []
    runner.fit(data)
    assert runner.split_points == ["blocks.1"]
    assert len(runner.stages) == 2
    outputs += [torch.equal(runner.predict(x), model.eval()(x)) for x, _ in data]
    outputs += [
        torch.equal(output, model.eval()(x))
        for output, (x, _) in zip(runner.predict_batches(data), data, strict=True)
    ]
    assert all(outputs)
    assert runner.evaluate(data).loss != before.loss
    assert list(runner.state_dict()) == keys
    fresh = Residual()
    fresh.load_state_dict(runner.state_dict())
    assert torch.equal(fresh.eval()(data[0][0]), runner.predict(data[0][0]))


def test_a_sample_captures_at_once_and_gives_the_same_training() -> None:
    data = data_of()
    split = residual(sample=data[0][0]).split
    assert split is not None
    found = []
    for options in (
        {"sample": data[0][0]},
        {},
        {"sample": data[2][0][:2], "split": split, "split_points": None},
    ):
        runner = residual(**options)
        assert (runner.split == split) == ("sample" in options)
        found.append((runner.fit(data, 2).batch_losses, runner.state_dict()))
        assert runner.split == split
    for losses, state in found[1:]:
        assert losses == found[0][0]
        assert same_bits(state, found[0][1])


def test_one_stage_is_plain_training() -> None:
    model, data = Residual(), data_of()
    without = copy.deepcopy(model)
    torch.manual_seed(4)
    losses = FDGRunner(model, ["cpu"], **HYPER).fit(data).batch_losses
    torch.manual_seed(4)
    assert losses == trained_plainly(without, data, F.cross_entropy)
    assert_alike(model, without, exactly=True)


def test_parameter_groups_and_optimizers_know_the_models_own_names() -> None:
    frozen = {"stem.weight": {"lr": 0.0, "weight_decay": 0.0}}
    runner = residual(3, param_groups=frozen)
    before = runner.state_dict()
    runner.fit(data_of())
    after = runner.state_dict()
    unchanged = {key for key in after if torch.equal(after[key], before[key])}
    assert unchanged == {"stem.weight"}
    assert sum(len(stage.optimizer_state()) for stage in runner.stages) == len(
        list(Residual().parameters())
    )
    residual(3, lr=0.1, optimizer=None).fit(data_of())


def test_cuts_are_found_where_pieces_take_equally_long() -> None:
    """Of calls in a row, whose pieces look alike but for what they call."""

    class Row(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.function(layer(x))
            return x

    data = [(torch.randn(5, 6), torch.randint(0, 6, (5,))) for _ in range(3)]
    for function in (torch.relu, torch.tanh):
        runner = FDGRunner(Row(function), ["cpu"] * 3)
        runner.fit(data)
        assert runner.split is not None
        assert len(runner.split) == 2
        again = FDGRunner(Row(function), ["cpu"] * 3)
        again.fit(data)
        assert again.split == runner.split
    from fdg_cuda import layer_times

    pieces = [
        FDGRunner(Row(f), ["cpu"], sample=data[0][0])._staged.chain.layers
        for f in (torch.relu, torch.tanh, torch.relu)
    ]
    first, other, same = (
        layer_times._key(each, data[0], weighted, 1, "cpu", layer_times.Precision.FLOAT32)
        for each in pieces
    )
    assert first == same
    assert first != other


def test_cuts_through_skips_are_found_too() -> None:
    model, x = made("unet")
    data = [(x, torch.zeros(2))] * 4
    runner = FDGRunner(model, ["cpu"] * 3, loss_fn=weighted, lr=0.001)
    before = runner.evaluate(data).loss
    runner.fit(data, epochs=2)
    assert runner.split is not None
    assert len(runner.split) == 2
    assert runner.evaluate(data).loss != before


def test_a_sequential_with_a_forward_of_its_own_is_captured() -> None:
    """Its children are not the chain."""

    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(3 * x)

    model, data = Scaled(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), data_of()
    runner = FDGRunner(model, ["cpu", "cpu"], split_points=["2"], method="bp", **HYPER)
    twin = copy.deepcopy(model)
    assert runner.fit(data).batch_losses == trained_plainly(twin, data, F.cross_entropy)
    assert_alike(model, twin, exactly=True)


def test_settings_inside_of_the_model_hold_under_a_precision() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
            self.dtypes: set[torch.dtype] = set()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            with torch.autocast("cpu", enabled=False):
                x = x.float() @ torch.ones(8, 8)
            return self.second(x)

    model, data = Careful(), data_of()
    seen: list[torch.dtype] = []
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    runner = FDGRunner(model, ["cpu", "cpu"], split_points=["second"], precision="bfloat16")
    runner.fit(data)
    assert set(seen) == {torch.float32}


# -- what changes between fits -----------------------------------------------------------------------


def test_buffers_that_stages_share_follow_the_model() -> None:
    """What load_state_dict and double() do to a buffer reaches every stage."""
    model, data = Residual(), data_of()
    model.register_buffer("scale", torch.full((8,), 0.5))
    runner = FDGRunner(model, ["cpu"] * 3, split_points=["blocks.1", "blocks.2"], lr=0.05)
    runner.fit(data)
    runner.load_state_dict({**model.state_dict(), "scale": torch.full((8,), 0.25)})
    assert torch.equal(runner.predict(data[0][0]), model.eval()(data[0][0]))
    model.double().train()
    runner.fit([(x.double(), y) for x, y in data])
    x = data[0][0].double()
    assert torch.equal(runner.predict(x), model.eval()(x))
    model.scale = torch.ones(8, dtype=torch.float64)
    assert torch.equal(runner.predict(x), model.eval()(x))


def replace_module(model: Any) -> None:
    model.blocks[1].inner = nn.Linear(8, 8)


def replace_parameter(model: Any) -> None:
    model.positions = nn.Parameter(torch.zeros(32, 16))


def hook(model: Any) -> None:
    model.blocks[1].register_forward_hook(lambda *_: None)


def hook_the_model(model: Any) -> None:
    model.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_module, "make a new FDGRunner"),
        (replace_parameter, "make a new FDGRunner"),
        (hook, r"blocks.1 got a hook after the model was captured"),
        (hook_the_model, r"the model itself has a forward hook"),
    ],
)
def test_a_model_changed_since_it_was_captured_is_refused(change: Any, words: str) -> None:
    ids = torch.randint(20, (2, 9))
    model, x = (
        (Gpt(tied=False), ids) if change is replace_parameter else (Residual(), data_of()[0][0])
    )
    runner = FDGRunner(model, ["cpu", "cpu"], split_points=["blocks.1"], sample=x)
    runner.predict(x)
    change(model)
    for use in (
        runner.predict,
        lambda x: runner.fit([(x, x)]),
        lambda x: runner.evaluate([(x, x)]),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            use(x)


def test_modes_are_the_models() -> None:
    """Frozen statistics of one block; and a model that was put in evaluation mode trains again."""
    runner = residual(2)
    model: Any = runner._model
    model.eval()
    runner.fit(data_of())
    assert model.training
    model.blocks[2].eval()
    before = copy.deepcopy(model.state_dict())
    runner.fit(data_of())
    after = model.state_dict()
    assert torch.equal(before["blocks.2.norm.running_mean"], after["blocks.2.norm.running_mean"])
    assert not torch.equal(
        before["blocks.1.norm.running_mean"], after["blocks.1.norm.running_mean"]
    )


# -- going on from checkpoints -----------------------------------------------------------------------


def a_run(
    folder: Path, *, crash: int = 10**6, resume: bool = False, sampled: bool = False, **options: Any
) -> dict[str, Tensor]:
    """What a script does from its first line on; all that is to be the same."""
    torch.manual_seed(3)
    x, y = torch.randn(27, 6), torch.randint(0, 4, (27,))
    runner = residual(sample=x[:4] if sampled else None, **options)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    history = runner.fit(
        loader,
        2,
        callbacks=[Crash(crash)],
        checkpoints=Checkpoints(folder, every=3, resume=resume),
    )
    state = runner.state_dict()
    state["losses"] = torch.tensor(history.batch_losses, dtype=torch.float64)
    for stage in runner.stages:
        for number, values in enumerate(stage.optimizer_state().values()):
            state[f"momentum {stage.index} {number}"] = values["momentum_buffer"]
    return state


@pytest.mark.parametrize(
    "options",
    [{}, {"sampled": True}, {"split_points": None}],
    ids=["first-batch", "sample", "measured"],
)
def test_going_on_gives_the_bits_of_training_without_a_break(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """The first batch, for the capture, is looked at before the checkpoint's states are there; the
    loader draws its order from them nevertheless."""
    expected = a_run(tmp_path / "unbroken", **options)
    for crash in (4, 8, 12):
        folder = tmp_path / str(crash)
        with pytest.raises(CrashError):
            a_run(folder, crash=crash, **options)
        resumed = a_run(folder, resume=True, **options)
        assert same_bits(resumed, expected), f"crash behind batch {crash}"


def test_going_on_needs_the_pieces_the_checkpoint_was_cut_by(tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        a_run(tmp_path, crash=8)
    torch.manual_seed(1)
    model = Residual()
    model.head = nn.Sequential(nn.Tanh(), model.head)
    runner = FDGRunner(model, ["cpu", "cpu"], split_points=["blocks.1"], lr=0.05)
    message = (
        r"checkpoint-0.*does not fit: the model was captured as 20 pieces and is captured as 21 "
    )
    with pytest.raises(CheckpointError, match=message):
        runner.fit(data_of(), checkpoints=Checkpoints(tmp_path, every=3, resume=True))
    runner = FDGRunner(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), ["cpu", "cpu"], split=[1])
    with pytest.raises(CheckpointError, match="20 pieces and is cut between its children now"):
        runner.fit(data_of(), checkpoints=Checkpoints(tmp_path, every=3, resume=True))


def test_a_batch_looked_at_too_early_is_not_lost() -> None:
    given = data_of(3)
    for loader in (given, iter(given)):
        batches = Batches(loader)
        first = batches.first()
        batches.begin_anew()
        assert batches.first()[0] is first[0]
        assert [x.shape for x, _ in batches.epoch()] == [x.shape for x, _ in given]


class Bound(nn.Module):
    """Made for batches of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.b(self.a(x).view(8, -1).relu())
        return hidden


def test_a_model_bound_to_one_batch_size_trains_with_that_one() -> None:
    torch.manual_seed(0)
    runner = FDGRunner(Bound(), ["cpu"] * 2, lr=0.01)
    batch = (torch.randn(8, 6), torch.randint(0, 3, (8,)))
    assert len(runner.fit([batch] * 3).batch_losses) == 3
    assert runner._staged.chain.point(0) == "a"
    with pytest.raises(ModelCaptureError, match=r"shape \(7, 6\), but .* captured for \(8, 6\)"):
        runner.fit([(batch[0][:7], batch[1][:7])])


def test_the_default_loss_says_that_it_takes_one_tensor() -> None:
    class InDict(Bound):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    runner = FDGRunner(InDict(), ["cpu"], lr=0.01)
    with pytest.raises(TypeError, match="output is a dict, the target a Tensor"):
        runner.fit([(torch.randn(8, 6), torch.randint(0, 3, (8,)))])
