"""Random numbers on several CPU stages: the same on every run, and nobody else's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, Batch, batches, even_split, same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fdg_cuda import FDGRunner
from fdg_cuda.randomness import (
    drawing_from,
    drawing_operators,
    reroute_generator,
    restore_generator,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WIDTH = 12
STATE = dict[str, Tensor]


class Noise(nn.Module):
    """A layer that draws by itself, also whether it draws more."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand(1) < 0.5:
            x = x + 0.1 * torch.randn_like(x)
        return x * torch.bernoulli(torch.full_like(x, 0.5))


class Steps(nn.Module):
    """(batch, width) to a sequence of three and back, around ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.unsqueeze(1) * torch.tensor([1.0, 0.5, 0.2]).view(1, 3, 1).to(x))
        return (y[0] if isinstance(y, tuple) else y).mean(1)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.3),
    "in place": lambda: nn.Dropout(0.3, inplace=True),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "rrelu": nn.RReLU,
    "own": Noise,
    "attention": lambda: Steps(SelfAttention()),
    "encoder": lambda: Steps(encoder()),
    "lstm": lambda: Steps(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3)),
}


def chain(layer: Callable[[], nn.Module]) -> nn.Sequential:
    """Six children, the random ones behind every cut of :func:`even_split`."""
    torch.manual_seed(1)
    first, middle, last = (
        nn.Linear(FEATURES, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, CLASSES),
    )
    return nn.Sequential(first, layer(), layer(), middle, layer(), last).double()


def trained(
    model: nn.Sequential,
    stages: int,
    *,
    seed: int = 5,
    delays: tuple[int, int] = (0, 0),
    data: list[Batch] | None = None,
    **options: Any,
) -> tuple[STATE, FDGRunner]:
    model = copy.deepcopy(model)
    runner = FDGRunner(
        model, ["cpu"] * stages, split=even_split(6, stages), **{"lr": 0.05, **options}
    )
    runner._machine.injected_delays = delays  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    runner.fit(batches(8) if data is None else data)
    return runner.state_dict(), runner


@pytest.mark.parametrize("backward_weights", ["stash", "replay"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_same_seed_same_bits_however_threads_interleave(
    kind: str, stages: int, backward_weights: str
) -> None:
    model = chain(LAYERS[kind])
    options = {"backward_weights": backward_weights}
    expected, _ = trained(model, stages, **options)
    assert all(value.isfinite().all() for value in expected.values())
    for seed in range(4):
        assert same_bits(trained(model, stages, delays=(seed, 1500), **options)[0], expected)
    assert not same_bits(trained(model, stages, seed=6, **options)[0], expected)


@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
def test_the_users_generator_is_left_alone(method: str) -> None:
    """Whatever the loader, a callback or the caller draws comes as if nothing else drew."""
    model = chain(LAYERS["dropout"])

    def drawn(draw_in_loader: bool) -> Tensor:
        data = batches(8)

        def loader() -> Any:
            for batch in data:
                if draw_in_loader:
                    seen.append(torch.rand(1))
                yield batch

        seen: list[Tensor] = []
        runner = FDGRunner(copy.deepcopy(model), ["cpu"] * 3, split=[2, 4], method=method)
        torch.manual_seed(5)
        if draw_in_loader:
            runner.fit(loader())
        else:
            seen = [torch.rand(1) for _ in data]
        return torch.cat([*seen, torch.rand(1)])

    assert torch.equal(drawn(True), drawn(False))
    assert torch.random.default_generator is torch.default_generator  # type: ignore[attr-defined]


def test_what_the_loader_draws_does_not_reach_the_stages() -> None:
    model = chain(LAYERS["dropout"])

    def loader() -> Any:
        for batch in batches(8):
            torch.rand(7)
            yield batch

    assert same_bits(trained(model, 3)[0], trained(model, 3, data=loader())[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("drawing", [False, True], ids=["list", "loader"])
@pytest.mark.parametrize("stages", [1, 2])
def test_two_fits_differ_and_equal_one_of_two_epochs(stages: int, drawing: bool) -> None:
    """With lr = 0, what differs from one fit to the next is the masks. A DataLoader draws from torch's
    generator whenever it is iterated."""
    model = chain(LAYERS["dropout"])
    data: Any = DataLoader(batches(8), batch_size=None) if drawing else batches(8)
    runner, twin = (
        FDGRunner(copy.deepcopy(model), ["cpu"] * stages, split=even_split(6, stages), lr=0.0)
        for _ in "12"
    )
    torch.manual_seed(5)
    first, second = (runner.fit(data).batch_losses for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    assert twin.fit(data, epochs=2).batch_losses == first + second


@pytest.mark.parametrize("stages", [1, 2])
def test_a_new_seed_begins_anew(stages: int) -> None:
    model = chain(LAYERS["dropout"])
    runner = FDGRunner(model, ["cpu"] * stages, split=even_split(6, stages), lr=0.0)
    losses = {}
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        now = runner.fit(batches(8)).batch_losses
        assert losses.setdefault(seed, now) == now
    assert losses[5] != losses[6]


def test_stages_draw_different_numbers() -> None:
    _, runner = trained(chain(LAYERS["dropout"]), 3)
    states = [state for stage in runner.stages for state in stage.random_state()]
    assert len({state.numpy().tobytes() for state in states}) == len(states) == 3


@pytest.mark.parametrize("backward_weights", ["stash", "replay"])
def test_the_random_state_is_where_training_goes_on(backward_weights: str) -> None:
    model = chain(LAYERS["dropout"])
    options: dict[str, Any] = {"momentum": 0.0, "backward_weights": backward_weights}
    torch.manual_seed(5)
    _, runner = trained(model, 3, **options)
    saved = copy.deepcopy(runner.state_dict())
    states = [stage.random_state() for stage in runner.stages]
    expected = runner.fit(batches(8)).batch_losses
    other = FDGRunner(copy.deepcopy(model), ["cpu"] * 3, split=[2, 4], lr=0.05, **options)
    other.load_state_dict(saved)
    torch.manual_seed(77)
    for stage, state in zip(other.stages, states, strict=True):
        stage.set_random_state(state)
    assert other.fit(batches(8)).batch_losses == expected


@pytest.mark.parametrize("kind", ["dropout", "rrelu", "own", "encoder"])
def test_a_single_stage_draws_as_plain_training_does(kind: str) -> None:
    model = chain(LAYERS[kind])
    plain = copy.deepcopy(model)
    state, _ = trained(model, 1, momentum=0.9, weight_decay=0.0)
    after = torch.get_rng_state()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(5)
    for x, y in batches(8):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(plain(x), y))
        optimizer.step()
    assert same_bits(state, plain.state_dict())
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), after), "torch's own generator was drawn from"


# -- activation checkpointing ------------------------------------------------------------------


class Block(nn.Module):
    """Draws before and inside a part that may be computed again in the backward."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2)
        if self.how is None:
            return self.layers(x)  # type: ignore[no-any-return]
        return checkpoint(self.layers, x, use_reentrant=self.how)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backward_weights", ["stash", "replay"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_layer_draws_its_mask_again(
    reentrant: bool, stages: int, backward_weights: str
) -> None:
    """Same bits as without checkpointing, and the user's generator is not set back and forth."""
    options = {"backward_weights": backward_weights}
    expected, _ = trained(chain(lambda: Block(None)), stages, **options)
    before = torch.get_rng_state()
    model = chain(lambda: Block(reentrant))
    for seed in range(3):
        got, _ = trained(model, stages, delays=(seed, 1500), **options)
        assert same_bits(got, expected)
        assert torch.equal(torch.get_rng_state(), before)


# -- the mechanism -----------------------------------------------------------------------------

X = torch.linspace(0.1, 0.9, 24).view(4, 6)
DRAWS: dict[str, Callable[[], Any]] = {
    "dropout": lambda: F.dropout(X),
    "dropout2d": lambda: F.dropout2d(X.view(1, 4, 2, 3)),
    "alpha_dropout": lambda: F.alpha_dropout(X, training=True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(X.view(1, 4, 6), training=True),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "rrelu": lambda: F.rrelu(-X, training=True),
    "rrelu_": lambda: F.rrelu_(-X.clone(), training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(*(X.view(1, 1, 4, 6),) * 3, dropout_p=0.5),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(X.view(1, 1, 4, 6), 2, 2),
    "rand": lambda: torch.rand(3, 2),
    "rand_like": lambda: torch.rand_like(X),
    "rand out": lambda: torch.rand(3, out=torch.empty(3)),
    "randn": lambda: torch.randn(5),
    "randn long": lambda: torch.randn(50),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(100, (7,)),
    "randint low": lambda: torch.randint(5, 100, (7,)),
    "randint_like": lambda: torch.randint_like(X, 100),
    "randperm": lambda: torch.randperm(20),
    "bernoulli": lambda: torch.bernoulli(X),
    "bernoulli p": lambda: torch.bernoulli(X, 0.5),
    "bernoulli_": lambda: X.clone().bernoulli_(0.5),
    "bernoulli_ tensor": lambda: torch.empty_like(X).bernoulli_(X),
    "bernoulli out": lambda: torch.bernoulli(X, out=torch.empty_like(X)),
    "multinomial": lambda: torch.multinomial(X, 3),
    "multinomial again": lambda: torch.multinomial(X, 9, replacement=True),
    "normal": lambda: torch.normal(0.0, 1.0, (5,)),
    "normal mean": lambda: torch.normal(X),
    "normal std": lambda: torch.normal(0.0, X),
    "normal both": lambda: torch.normal(X, X),
    "normal_": lambda: torch.empty(5).normal_(),
    "uniform_": lambda: torch.empty(5).uniform_(),
    "cauchy_": lambda: torch.empty(5).cauchy_(),
    "exponential_": lambda: torch.empty(5).exponential_(),
    "geometric_": lambda: torch.empty(5).geometric_(0.3),
    "log_normal_": lambda: torch.empty(5).log_normal_(),
    "random_": lambda: torch.empty(5).random_(),
    "random_ to": lambda: torch.empty(5).random_(9),
    "random_ from": lambda: torch.empty(5).random_(3, 9),
    "poisson": lambda: torch.poisson(9 * X),
    "binomial": lambda: torch.binomial(torch.full_like(X, 9), X),
    "gamma": lambda: torch._standard_gamma(X),
    "dirichlet": lambda: torch.distributions.Dirichlet(X).rsample(),
    "init": lambda: nn.init.kaiming_uniform_(torch.empty(3, 3)),
    "seed": lambda: (torch.manual_seed(9), torch.rand(2))[1],
    "initial seed": lambda: torch.tensor(torch.initial_seed()),
    "state": torch.get_rng_state,
}


@pytest.fixture
def generator() -> Any:
    reroute_generator()
    yield torch.Generator()
    restore_generator()


@pytest.mark.parametrize("kind", DRAWS)
def test_every_draw_is_what_torch_would_draw(kind: str, generator: torch.Generator) -> None:
    draw = DRAWS[kind]
    torch.manual_seed(3)
    expected = [draw(), draw(), torch.rand(1)]
    generator.manual_seed(3)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    with drawing_from(generator):
        got = [draw(), draw(), torch.rand(1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: torch.rand(4, generator=g),
        lambda g: torch.empty(4).uniform_(generator=g),
        lambda g: torch.poisson(9 * X, g),
        lambda g: torch.binomial(torch.full_like(X, 9), X, g),
        lambda g: torch.randperm(9, generator=g),
        lambda g: torch.multinomial(X, 2, generator=g),
    ],
)
def test_a_generator_that_is_given_is_used(
    draw: Callable[[torch.Generator], Tensor], generator: torch.Generator
) -> None:
    expected = draw(torch.Generator().manual_seed(3))
    before = generator.get_state()
    with drawing_from(generator):
        assert torch.equal(draw(torch.Generator().manual_seed(3)), expected)
    assert torch.equal(generator.get_state(), before)


def test_no_operator_of_this_torch_draws_past_the_stages() -> None:
    """Kernels torch marks as random but gives no generator: these are made of operators that have
    one, or draw nothing on a CPU."""
    known = {
        "aten::native_dropout",
        "aten::_fused_sdp_choice",  # chooses a kernel
        "aten::_scaled_dot_product_flash_attention_for_cpu",  # chosen without dropout only
    }
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    drawing, unknown = set(drawing_operators()), set()
    for name in (name for name in names if name.startswith("aten::")):
        packet, _, overload = name.removeprefix("aten::").partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if torch.Tag.nondeterministic_seeded in operator.tags and name not in drawing:
            unknown.add(name)
    assert unknown <= known
    assert len(drawing) > 20
