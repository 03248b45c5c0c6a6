"""What a captured chain offers, follows, and refuses."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from captured_models import UNet, gpt, made
from captures import Root, refusal, run
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner
from fdg_cuda.capture import capture
from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.graph_chain import GraphChain

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded")

X = torch.linspace(-1, 1, 24).view(4, 6)


class Function(nn.Module):
    """A chain of linear layers around a function of the test's."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.middle = Inner(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class Inner(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.drops = 0.3
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def agrees(model: nn.Module, chain: GraphChain, value: Tensor) -> bool:
    """Piece by piece, in both modes, with equal random numbers."""
    same = []
    for training in (True, False):
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(3)
        expected, after = model(value), copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        torch.manual_seed(3)
        same.append(torch.equal(run(chain, value), expected))
        same += [torch.equal(v, after[k]) for k, v in model.state_dict().items()]
    return all(same)


# -- what is followed -------------------------------------------------------------------------------


def masked(self: Any, x: Tensor) -> Tensor:
    mask = torch.ones(len(x), x.shape[1], device=x.device, dtype=x.dtype)
    mask[:, : x.size(1) // 2] = 0
    return x * mask


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = x.softmax(dim=1)
    return x * weight


def autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.t()
    return y.float() @ x


def counts(self: Any, x: Tensor) -> Tensor:
    self.count.add_(1)
    return x + self.count


def takes_apart(self: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    (top, index), scale = x.max(dim=1), x.shape[1] ** -0.5
    return torch.cat([a, b * scale], dim=1) + top[:, None] + index[:, None] * math.sqrt(x.size(1))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Tensor:
        return 7 * error  # not what autograd would find in the forward


CONSTANT = torch.arange(6.0)
FOLLOWED = {
    "reshape": lambda self, x: x.view(x.size(0) * 2, -1).reshape(len(x), x.shape[1]),
    "dropout by mode": lambda self, x: F.dropout(x, self.drops, training=self.training),
    "random": lambda self, x: x + torch.rand(x.shape) + torch.randn_like(x),
    "masked": masked,
    "no_grad": no_grad,
    "autocast": autocast,
    "buffer written": counts,
    "buffer and constant": lambda self, x: x * self.table + CONSTANT,
    "takes apart": takes_apart,
    "own backward": lambda self, x: Double.apply(x),
    "numpy index": lambda self, x: x[:, [5, 4, 3, 2, 1, 0]][..., None].squeeze(-1),
    "comparison": lambda self, x: x * 2 if x.shape[1] > 4 and x.dim() == 2 else x,
    "in place": lambda self, x: F.relu((x * 2).add_(1), inplace=True),
    "list of results": lambda self, x: torch.stack([row.cumsum(0) for row in x.unbind(1)], dim=1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_follows(name: str) -> None:
    """Call by call, for another number of samples too."""
    model = Function(FOLLOWED[name])
    chain = capture(model, X)
    assert chain.whole == {}
    assert agrees(model, chain, X)
    assert agrees(model, chain, torch.randn(7, 6))


def of_values(self: Any, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x - 1


def of_mode(self: Any, x: Tensor) -> Tensor:
    return x + torch.randn_like(x) if self.training else x


def of_the_batch(self: Any, x: Tensor) -> Tensor:
    return torch.stack([row * i for i, row in enumerate(x)])


def of_dice(self: Any, x: Tensor) -> Tensor:
    random.random()
    return x * 3


def of_state(self: Any, x: Tensor) -> Tensor:
    self.steps = getattr(self, "steps", 0) + 1
    return x * 3


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (of_values, "takes a bool out of a tensor"),
        (lambda self, x: x * x.sum().item(), "takes a float out of a tensor"),
        (of_mode, "differs between training and evaluation"),
        (of_the_batch, "depends on the number of samples"),
        (of_dice, "Python's random module"),
        (of_state, "sets the attribute 'steps'"),
    ],
)
def test_calls_a_module_as_a_whole_where_its_code_must_be_asked_again(
    function: Any, why: str
) -> None:
    model = Function(function)
    chain = capture(model, X)
    assert list(chain.whole) == ["middle"]
    assert why in chain.whole["middle"]
    assert len(chain) > 3
    for value in (X, -X, torch.randn(7, 6)):
        assert agrees(model, chain, value)
    with pytest.raises(ModelCaptureError, match=r"one of the model's own|must lie|no submodule"):
        chain.stages(["middle.inner"])


def test_a_module_with_hooks_is_called_as_a_whole_and_its_hooks_too() -> None:
    model, seen = UNet(), []
    model.down[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = torch.randn(2, 3, 16, 16)
    chain = capture(model, x)
    seen.clear()
    run(chain, x)
    assert len(seen) == 1


def test_an_encoder_is_cut_between_its_layers_whatever_it_does_in_evaluation_mode() -> None:
    """By default it makes one nested tensor for all of them, where nothing wants gradients."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=mask)

    model, mask = Model().eval(), torch.tensor([[False] * 4, [False, False, True, True]])
    batch = (torch.randn(2, 4, 6), mask)
    chain = capture(model, batch)
    assert chain.whole == {}
    assert model.encoder.use_nested_tensor
    assert len(chain.stages(["encoder.layers.1", "encoder.layers.2"])) == 3
    assert torch.equal(run(chain, batch), model(*batch))
    with torch.no_grad():
        found, expected = run(chain, batch), model(*batch)
    assert torch.allclose(found[~mask], expected[~mask], atol=1e-5)


def test_a_frozen_part_stays_in_evaluation_mode() -> None:
    """What depends on the mode follows the modules, one by one, as the user sets them."""
    model = Function(lambda self, x: F.dropout(x, 0.5, training=self.training))
    model.middle.eval()
    chain = capture(model, X)
    assert model.training
    assert not model.middle.training
    assert torch.equal(run(chain, X), model(X))


def test_capture_leaves_no_trace() -> None:
    model = Function(counts)
    model.first.weight.grad = torch.ones(6, 6)
    state, x = copy.deepcopy(model.state_dict()), X.clone()
    names = set(vars(model.middle))
    random_state, call = torch.get_rng_state(), nn.Module.__call__
    capture(model, x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert nn.Module.__call__ is call
    assert torch.equal(x, X)
    assert bool((model.first.weight.grad == 1).all())
    assert set(vars(model.middle)) == names


# -- cuts -------------------------------------------------------------------------------------------


def test_stages_hold_the_models_own_parameters_and_each_only_its_own() -> None:
    model, sample = made("gpt")
    chain = capture(model, sample)
    stages = chain.stages(["blocks.1", "blocks.2"])
    own = [{id(p) for p in stage.parameters()} for stage in stages]
    assert set().union(*own) == {id(p) for p in model.parameters()}
    assert sum(map(len, own)) == len(list(model.parameters()))
    assert {id(p) for p in model.blocks[1].parameters()} == own[1]


def test_a_value_travels_as_far_as_its_last_user() -> None:
    model = UNet()
    x = torch.randn(2, 3, 16, 16)
    chain = capture(model, x)
    names = ["down.1", "down.2", "bottom", "up.1.mix", "head"]
    counts = [len(chain.crossing(chain.cut_at(name))) for name in names]
    # Three skips are under way at the bottom, beside what is pooled; up.1.mix has taken two.
    assert counts == [2, 3, 4, 3, 1] or counts == [2, 3, 4, 2, 1]
    stages = chain.stages(["down.1", "bottom"])
    hop = stages[0](x)
    assert stages[1](hop)[0] is hop[0]  # handed through, the same tensor


def test_sizes_travel_without_the_tensor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.tanh(self.a(x)))
            return self.c(y).view(x.size(0), 1, 2).expand(x.shape[0], x.shape[1], 2)

    model = Model()
    chain = capture(model, X)
    sizes = [crossing for crossing in chain.crossing(chain.cut_at("c")) if crossing.sizes_only]
    assert len(sizes) == 1
    assert sizes[0].nbytes == 0
    assert agrees(model, chain, torch.randn(3, 6))


def test_a_skip_that_is_written_into_is_seen_by_both_its_users_or_not_cut() -> None:
    def skip(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        view = y[:, :3]
        z = self.second(y)
        y.relu_()
        return z + view.sum()

    model = Root(skip)
    with torch.no_grad():
        chain = capture(model, X)
        assert agrees(model, chain, X)
        with pytest.raises(ModelCaptureError, match=r"cannot cut before second: relu_ .* in place"):
            chain.cut_at("second")


def test_a_tensor_written_into_behind_a_cut_leaves_the_stage_before_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    chain = capture(model, X)
    first, second = chain.stages(["1"])
    hop = first(X)
    before = hop.clone()
    assert torch.equal(second(hop.detach()), model(X))
    assert torch.equal(hop, before)


def test_pieces_one_behind_the_other_write_where_the_model_writes() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    linear, relu, _ = capture(model, X).pieces
    hop = linear(X)
    assert relu(hop) is hop


def test_buffers_are_shared_by_stages_and_followed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((6,), 2.0))
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale) * self.scale

    model = Model()
    stages = capture(model, X).stages(["b"])
    owned = [id(buffer) for stage in stages for buffer in stage.buffers()]
    assert len(set(owned)) == 2
    assert id(model.scale) in owned
    model.load_state_dict({**model.state_dict(), "scale": torch.full((6,), 3.0)})
    assert torch.equal(stages[1](stages[0](X)), model(X))
    stages[0].to(torch.float64)
    assert model.scale.dtype == torch.float64


def test_a_tied_embedding_forbids_the_cuts_between_and_says_the_remedy() -> None:
    model, sample = gpt(tied=True)
    chain = capture(model, sample)
    with pytest.raises(ModelCaptureError) as caught:
        chain.stages(["blocks.1"])
    message = str(caught.value)
    assert "parameter words.weight is used in words (" in message
    assert "captured_models.py" in message
    assert "in head (" in message
    assert "nn.Parameter" in message
    assert len(chain) < 4


def test_a_loop_over_one_cell_cannot_be_cut_through() -> None:
    def loop(self: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.first(x))
        return self.second(x)

    chain = capture(Root(loop), X)
    with pytest.raises(
        ModelCaptureError, match=r"between 1 and 2.*used 3 times, in a loop around first"
    ):
        chain.stages([1, 2, 3])
    assert len(chain.stages(["second"])) == 2


def test_names_to_cut_before() -> None:
    chain = capture(UNet(), torch.randn(2, 3, 16, 16))
    assert [chain.cut_at(name) for name in ("down.2", "bottom.0")] == sorted(
        chain.cut_at(name) for name in ("down.2", "bottom.0")
    )
    with pytest.raises(ModelCaptureError, match=r"no submodule 'xyz' .*; its submodules are "):
        chain.cut_at("xyz")
    with pytest.raises(ModelCaptureError, match=r"no submodule 'buttom'.*bottom"):
        chain.stages(["buttom"])
    with pytest.raises(ModelCaptureError, match="cannot cut before down: it begins the model"):
        chain.stages(["down"])
    with pytest.raises(ModelCaptureError, match="in the order the model runs"):
        chain.stages(["bottom", "down.1"])
    chain = capture(*made("masked encoder"))
    with pytest.raises(
        ModelCaptureError, match=r"inside encoder.layers.1, a TransformerEncoderLayer"
    ):
        chain.stages(["encoder.layers.1.linear1"])


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [of_values, of_mode, of_the_batch, of_state])
def test_control_flow_of_the_models_own_forward_is_refused_with_the_line(function: Any) -> None:
    message = refusal(Root(function), X)
    assert "the model's own forward cannot be followed" in message
    assert "submodule" in message
    assert "list of modules" in message
    if function is not of_state:
        assert f'test_capture.py", line {function.__code__.co_firstlineno + 1}' in message


def test_models_and_samples_that_cannot_be() -> None:
    linear = nn.Linear(6, 2)
    assert "could not run on the sample ((4, 5) torch.float32)" in refusal(
        linear, torch.zeros(4, 5)
    )
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        capture(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the sample must be a tensor"):
        capture(linear, [1, 2])
    assert "complex" in refusal(nn.Linear(6, 2, dtype=torch.complex64), X)
    assert "lazy" in refusal(nn.LazyLinear(3), X)
    assert "model.module" in refusal(nn.DataParallel(linear), X)
    split = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2, device="meta"))
    assert "several devices (0.weight on cpu, 1.weight on meta)" in refusal(split, X)
    quantized = nn.Linear(6, 2)
    quantized.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    assert "quantized" in refusal(quantized, X)
    compiled = nn.Sequential(torch.compile(nn.Linear(6, 6)), linear)
    assert "0 went through torch.compile" in refusal(compiled, X)
    pack = nn.utils.rnn.pack_sequence
    packing = Root(lambda self, x: self.first(pack([x, x]))[1])
    packing.first = nn.GRU(6, 3)
    assert "a PackedSequence is passed on" in refusal(packing, X)
    hidden = [nn.Parameter(torch.ones(6))]
    assert "no registered parameter" in refusal(Root(lambda self, x: self.first(x) * hidden[0]), X)


def test_stages_train_in_a_runner_as_stages_cut_by_hand_do() -> None:
    """Where one tensor crosses each cut; and the caller's model holds the trained weights."""

    def stages_by_hand(model: Any) -> list[nn.Module]:
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
        head = nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc)
        return [stem, nn.Sequential(model.layer2, model.layer3), head]

    model = made("resnet")[0].double()
    twin = copy.deepcopy(model)
    data = [(torch.randn(n, 3, 16, 16).double(), torch.randint(0, 10, (n,))) for n in (4, 4, 4, 3)]
    captured = capture(model, data[0][0]).stages(["layer2.0", "layer4.0"])
    losses = []
    for stages in (captured, stages_by_hand(twin)):
        runner = FDGRunner(nn.Sequential(*stages), ["cpu"] * 3, split=[1, 2], lr=0.01)
        losses.append(runner.fit(data, epochs=2).batch_losses)
    assert losses[0] == losses[1]
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())
