"""What stages pass on may be several tensors: the numbers are those of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captured_models import made
from chains import CLASSES, FEATURES, Batch, batches, largest_difference, oracle, same_bits
from hopping import FANS, LAYERS, Beside, Fan, Grow, Stateful, fanned, hopping, joined, own_names
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional as F
from versions import TOLERANCE, runner_of, state

from fdg_cuda.capture import capture
from fdg_cuda.exact_copy import exact_copy
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

SPLITS = {2: [2], 3: [2, 3], 4: [1, 3, 4]}
SETTINGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def trained_plainly(
    model: nn.Module, data: Sequence[tuple[Any, Any]], loss_fn: Callable[..., Tensor]
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_fn(model(copy.deepcopy(x)), copy.deepcopy(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def equals_plain_training(
    model: nn.Sequential,
    split: list[int],
    data: Sequence[tuple[Any, Any]],
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> None:
    """With ``method="bp"``, to the bit; evaluation and prediction too."""
    twin = copy.deepcopy(model)
    expected = trained_plainly(twin, data, loss_fn)
    stages = len(split) + 1
    runner = runner_of(model, stages, method="bp", split=split, loss_fn=loss_fn, **SETTINGS)
    assert runner.fit(data).batch_losses == expected
    assert same_bits(state(model), state(twin))
    twin.eval()
    with torch.no_grad():
        expected_loss = sum(loss_fn(twin(x), y).item() * len(y) for x, y in data)
    samples = sum(len(y) for _, y in data)
    assert runner.evaluate(data).loss == pytest.approx(expected_loss / samples, rel=1e-12)


@pytest.mark.parametrize("stages", SPLITS)
def test_bp_is_plain_training(stages: int) -> None:
    equals_plain_training(hopping(), SPLITS[stages], batches(4))


@pytest.mark.parametrize("weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("stages", SPLITS)
def test_agrees_with_the_oracle_of_the_joined_chain(stages: int, method: str, weights: str) -> None:
    """The oracle passes on one tensor, in which all are columns."""
    model, split, data = hopping(), SPLITS[stages], batches(7)
    options: dict[str, Any] = {"method": method, "backward_weights": weights, "lr": 0.05}
    expected, recorded = oracle(joined(model), split, data, **options)
    runner = runner_of(model, stages, split=split, **options)
    losses = runner.fit(data).batch_losses
    assert losses == pytest.approx(recorded.losses, rel=TOLERANCE)
    assert largest_difference(state(model), own_names(expected)) < TOLERANCE
    whole = nn.Sequential(*copy.deepcopy(model).eval())
    assert torch.equal(runner.predict(data[0][0]), whole(data[0][0]))


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.1}, {"accumulate": 2}, {"backward_weights": "replay"}],
    ids=["clipped", "accumulated", "replayed"],
)
def test_batch_norm_dropout_and_what_python_does_to_gradients(options: dict[str, Any]) -> None:
    """The joined chain draws the same masks."""
    found = []
    for make in (lambda model: model, joined):
        torch.manual_seed(1)
        model = make(hopping(noisy=True))
        losses = runner_of(model, 3, split=[2, 3], **options).fit(batches(7)).batch_losses
        found.append((losses, own_names(state(model))))
    assert found[0][0] == pytest.approx(found[1][0], rel=TOLERANCE)
    assert largest_difference(found[0][1], found[1][1]) < TOLERANCE


def test_float16_scales_and_unscales_all_of_them() -> None:
    found = []
    for split in ([], [2, 3]):
        model = hopping().float()
        data = [(x.float(), y) for x, y in batches(5)]
        stages = len(split) + 1
        runner = runner_of(model, stages, split=split, method="bp", precision="float16")
        history = runner.fit(data)
        found.append((history.batch_losses, history.epochs[0].skipped[:1], state(model)))
    assert found[0][:2] == found[1][:2]
    assert same_bits(found[0][2], found[1][2])


def test_an_overflow_reaches_the_stages_below_through_every_signal() -> None:
    class Overflowing(nn.Module):
        def forward(self, hop: Any) -> Tensor:
            b, a, *_ = hop
            return F.pad(b[:, :1] + 1e30 * (a[:, 1:2] - a[:, 1:2].detach()), (0, 3))

    model = nn.Sequential(*hopping()[:3], Overflowing()).float()
    data = [(x.float(), y) for x, y in batches(2)]
    runner = runner_of(model, 3, split=[1, 3], precision="float16", method="bp")
    assert runner.fit(data).epochs[0].skipped == (2, 2, 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_timing_changes_no_bit(method: str) -> None:
    found = []
    for delays in ((0, 0), (1, 300)):
        model = hopping(noisy=True)
        torch.manual_seed(2)
        runner = runner_of(model, 4, split=SPLITS[4], method=method)
        runner._machine.injected_delays = delays  # type: ignore[attr-defined]
        losses = runner.fit(batches(8)).batch_losses
        found.append((losses, runner.evaluate(batches(8)), state(model)))
    for other in found[1:]:
        assert other[:2] == found[0][:2]
        assert same_bits(other[2], found[0][2])


@pytest.mark.parametrize("replay", [False, True])
def test_what_wants_a_gradient(replay: bool) -> None:
    """What is trainable below does, as in the whole model; where a forward runs without a graph, all
    that can."""
    seen = []

    class Looking(nn.Module):
        def forward(self, hop: Any) -> Any:
            seen.append(tuple(tensor.requires_grad for tensor in hop))
            return hop

    layers = list(hopping())
    model = nn.Sequential(*layers[:2], Looking(), *layers[2:])
    runner_of(model, 2, split=[2], backward_weights="replay" if replay else "stash").fit(batches(3))
    assert set(seen) == {(True, True, False, replay)}


@pytest.mark.parametrize("change", [False, True])
def test_what_enters_and_is_handed_through_wants_no_gradient_when_replayed(change: bool) -> None:
    """In the first batch, which is copied, and later; unless what is trainable was written into it."""
    seen = []

    def look(hop: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(tuple(tensor.requires_grad for tensor in hop))
        return hop

    def scale(hop: Any) -> Any:
        return hop[0], hop[1].mul_(hop[0]) if change else hop[1]

    first = nn.Sequential(Beside(5), Fan(scale))
    stages = first, nn.Sequential(Fan(look), Beside(5)), nn.Sequential(Fan(look), Beside(CLASSES))
    data = [((x[:, :5], x[:, 1:6]), y) for x, y in batches(4)]

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target)

    model = nn.Sequential(*stages).double()
    runner_of(model, 3, split=[1, 2], loss_fn=loss, backward_weights="replay").fit(data)
    assert set(seen) == {(True, change)}


# -- captured models ------------------------------------------------------------------------------


def unet() -> tuple[nn.Module, list[Batch], list[str]]:
    model = made("unet")[0].double()
    data = [
        (torch.randn(n, 3, 8, 8).double(), torch.randint(2, (n, 8, 8)).long()) for n in (3, 3, 2)
    ]
    return model, data, ["down.1", "up.0", "up.2"]


def masked_encoder() -> tuple[nn.Module, list[Any], list[str]]:
    """Token ids and a mask: integers, and in the attention mask floats without gradient."""
    model, sample = made("masked encoder")
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    data = [(sample, torch.randint(3, (2,))) for _ in range(3)]
    return model.double(), data, ["encoder.layers.1", "encoder.layers.2", "encoder.layers.3"]


@pytest.mark.parametrize(
    ("make", "stages"), [(unet, 4), (masked_encoder, 3)], ids=["unet", "masked encoder"]
)
def test_captured_models(make: Callable[[], Any], stages: int) -> None:
    model, data, names = make()
    chain = capture(model, data[0][0])
    cuts = names[: stages - 1]
    assert any(len(chain.crossing(chain.cut_at(name))) > 1 for name in cuts)
    split = list(range(1, stages))
    equals_plain_training(nn.Sequential(*chain.stages(cuts)), split, data)


def test_a_captured_model_with_delayed_gradients() -> None:
    """As its stages joined by hand to pass on one tensor."""
    model, data, names = unet()
    twin, oracles = copy.deepcopy(model), []
    for one in (model, twin):
        stages = capture(one, data[0][0]).stages(names)
        chain: nn.Sequential = nn.Sequential(*stages)
        if one is twin:
            chain = nn.Sequential(*_flat(stages, data[0][0]))
        losses = runner_of(chain, 4, split=[1, 2, 3]).fit(data[:2], epochs=3).batch_losses
        oracles.append(losses)
    assert oracles[0] == pytest.approx(oracles[1], rel=TOLERANCE)
    assert largest_difference(state(model), state(twin)) < TOLERANCE


class _Flat(nn.Module):
    """A stage that takes and gives all its tensors as one, flattened behind the batch."""

    def __init__(self, stage: nn.Module, shapes: list[tuple[int, ...]], *, last: bool) -> None:
        super().__init__()
        self.stage = stage
        self.shapes = shapes
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        hop: Any = x
        if self.shapes:
            parts = x.split([torch.Size(shape).numel() for shape in self.shapes], dim=1)
            hop = tuple(p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True))
            hop = hop[0] if len(hop) == 1 else hop
        given = self.stage(hop)
        if self.last:
            return given  # type: ignore[no-any-return]
        return torch.cat([t.flatten(1) for t in _several(given)], dim=1)


def _several(hop: Any) -> tuple[Tensor, ...]:
    return (hop,) if isinstance(hop, Tensor) else hop


def _flat(stages: Sequence[nn.Module], sample: Tensor) -> list[nn.Module]:
    flat, shapes, value = [], [], sample
    for stage in stages:
        flat.append(_Flat(stage, shapes, last=stage is stages[-1]))
        value = copy.deepcopy(stage)(value)
        shapes = [tuple(t.shape[1:]) for t in _several(value)]
    return flat


# -- what tensors of a hop may have in common -----------------------------------------------------


@pytest.mark.parametrize("name", FANS)
def test_tensors_that_have_something_in_common(name: str) -> None:
    """At a cut, and handed through a stage in between."""
    equals_plain_training(fanned(name), [2, 3], batches(3))


def test_a_view_cannot_be_changed_in_place_behind_a_cut() -> None:
    model = nn.Sequential(
        nn.Linear(FEATURES, 5),
        Fan(lambda x: (x, x[:, :2])),
        Fan(lambda hop: hop[0].mul_(2) + F.pad(hop[1], (0, 3))),
        nn.Linear(5, CLASSES),
    ).double()
    with refused(RuntimeError, "stage 1", "from stage 0", "inplace=False", "clone()"):
        runner_of(model, 2, split=[2]).fit(batches(3))


def test_a_view_that_was_handed_through_cannot_be_changed_in_place() -> None:
    """With the first batch, which the stage in between works on copies of; what overlaps nothing can."""

    def train(fan: Callable[[Tensor], Any]) -> None:
        model = nn.Sequential(
            nn.Sequential(nn.Linear(FEATURES, 5), Fan(fan)),
            Fan(lambda hop: (hop[1], *hop)),
            Fan(lambda hop: hop[0].mul_(2) + F.pad(hop[2], (0, 5 - hop[2].shape[1]))),
            nn.Linear(5, CLASSES),
        ).double()
        runner_of(model, 3, split=[1, 2]).fit(batches(1))

    train(lambda x: (x[:, :3].clone(), x))
    with refused(RuntimeError, "stage 2", "from stage 1", "inplace=False"):
        train(lambda x: (x[:, :3], x))


@pytest.mark.parametrize("change", [False, True])
def test_every_batch_lies_in_memory_as_it_was_made(change: bool) -> None:
    """Whether it was copied or not: kernels may round otherwise where strides or alignment differ."""
    seen = set()

    def look(x: Tensor) -> Tensor:
        seen.add((x.stride(), x.data_ptr() % 64))
        return x.mul_(2) if change else x * 2

    data = [(x.repeat(2, 1), y.repeat(2)) for x, y in batches(2)]
    stages = nn.Linear(FEATURES, 15), Fan(lambda x: x[:, 5::2]), Fan(look), nn.Linear(5, CLASSES)
    runner_of(nn.Sequential(*stages).double(), 2, split=[2]).fit(data)
    assert seen == {((15, 2), 40)}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:, ::2],
        lambda x: x[:, 1:2].expand(-1, 3),
        lambda x: x.t(),
        lambda x: x.flatten()[3:],
        lambda x: x.unfold(1, 2, 1),
        lambda x: x[:0],
        lambda x: torch.complex(x, x).conj()[1],
        lambda x: x[2, 3],
    ],
)
def test_exact_copies(view: Callable[[Tensor], Tensor]) -> None:
    sources = [view(torch.arange(20.0).view(4, 5)).detach().requires_grad_() for _ in range(2)]
    copies = [exact_copy(sources[0]), sources[1]]
    assert torch.equal(*copies)
    assert copies[0].stride() == copies[1].stride()
    assert copies[0].data_ptr() % 64 == copies[1].data_ptr() % 64
    assert copies[0].untyped_storage().data_ptr() != sources[0].untyped_storage().data_ptr()
    for copy_ in copies:
        (copy_.abs() * copy_.abs().detach()).sum().backward()
    assert torch.equal(*(source.grad for source in sources))


def test_what_is_handed_through_is_changed_by_nobody() -> None:
    """Three stages hold it; the last works on it in place, those below still need it."""

    class Using(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Any:
            return x, self.layer(x)

    def chain(last: Callable[[Any], Any]) -> nn.Sequential:
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh())  # needs its output in its backward
        return nn.Sequential(first, Using(), Fan(last), nn.Linear(5, CLASSES)).double()

    found = []
    for join in (lambda hop: hop[0].mul_(hop[1]).exp_(), lambda hop: hop[0].mul(hop[1]).exp()):
        for delays in ((0, 0), (5, 300)):
            model = chain(join)
            runner = runner_of(model, 3, split=[1, 2])
            runner._machine.injected_delays = delays  # type: ignore[attr-defined]
            found.append((runner.fit(batches(6)).batch_losses, state(model)))
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert same_bits(other[1], found[0][1])


@pytest.mark.parametrize("weights", ["stash", "replay"])
def test_a_loss_may_change_in_place_what_was_handed_through(weights: str) -> None:
    """It is an input of the first stage's second forward."""

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target)

    def changing_loss(output: Any, target: Tensor) -> Tensor:
        found = loss(output, target)
        output[1].mul_(10)
        return found

    data = [((x[:, :5].clone(), x[:, 1:6].clone()), y) for x, y in batches(5)]
    found = []
    for loss_fn in (loss, changing_loss):
        torch.manual_seed(0)
        model = nn.Sequential(Beside(5), Beside(CLASSES)).double()
        runner = runner_of(model, 2, split=[1], loss_fn=loss_fn, backward_weights=weights)
        found.append((runner.fit(data).batch_losses, state(model)))
    assert found[0][0] == found[1][0]
    assert same_bits(found[0][1], found[1][1])


@pytest.mark.parametrize("weights", ["stash", "current"])
def test_weights_and_buffers_may_be_passed_on(weights: str) -> None:
    """The next batch, or an update, changes them while the stage above is at work."""
    found = []
    for own in (True, False):
        for delays in ((0, 0), (1, 400)):
            torch.manual_seed(0)
            model = nn.Sequential(Stateful(own_memory=own), Grow(), nn.Linear(5, CLASSES)).double()
            runner = runner_of(model, 3, split=[1, 2], backward_weights=weights)
            runner._machine.injected_delays = delays  # type: ignore[attr-defined]
            losses = runner.fit(batches(8)).batch_losses
            found.append(((losses, runner.evaluate(batches(8))), state(model)))
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert same_bits(other[1], found[0][1])


# -- the last stage's output ----------------------------------------------------------------------


def two_heads() -> nn.Sequential:
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.size = nn.Linear(5, CLASSES), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"classes": self.classes(x), "size": [self.size(x), None], "kind": "heads"}

    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), Heads()).double()


def loss_of_heads(output: dict[str, Any], target: Tensor) -> Tensor:
    assert output.pop("kind") == "heads"  # it may take the output apart
    size, _ = output.pop("size")
    return F.cross_entropy(output.pop("classes"), target) + F.mse_loss(size[:, 0], target.double())


@pytest.mark.parametrize("split", [[], [2], [1, 2]], ids=len)
def test_the_output_may_be_a_dict(split: list[int]) -> None:
    data = batches(4)
    equals_plain_training(two_heads(), split, data, loss_of_heads)
    model = two_heads()
    runner = runner_of(model, len(split) + 1, split=split, loss_fn=loss_of_heads)
    assert runner.fit(data).epochs[0].accuracy is None
    assert runner.evaluate(data).accuracy is None
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(data[0][0])
    for found in (runner.predict(data[0][0]), next(iter(runner.predict_batches(data)))):
        assert found["kind"] == "heads"
        assert found["size"][1] is None
        assert torch.equal(found["classes"], expected["classes"])
        assert torch.equal(found["size"][0], expected["size"][0])


def test_the_chain_of_these_tests_uses_its_hops() -> None:
    """Several tensors, one handed through every stage, one integer, one float without gradient."""
    hop: Any = batches(1)[0][0]
    for layer in hopping()[: LAYERS - 1]:
        hop = layer(hop)
        assert [t.dtype for t in hop] == [torch.float64, torch.float64, torch.int64, torch.float64]
        assert [t.requires_grad for t in hop] == [True, True, False, False]
