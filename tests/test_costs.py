"""What layers cost."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from chains import CLASSES, FEATURES, batches, mlp
from several_tensors import Fork, Handing, Join
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner, costs, layer_passes, whole_pass
from fdg_cuda.at_work import measured_at_work
from fdg_cuda.capture import capture
from fdg_cuda.costs import LayerCost, measure

CROSS_ENTROPY = nn.functional.cross_entropy
BATCH = batches(1, last=None)[0]  # 8 samples


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST_PASSES", 1)


def test_measuring_leaves_no_trace() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(8, 4)
    ]  # fmt: skip
    model = nn.Sequential(*layers).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    measured = measure(layers, BATCH, CROSS_ENTROPY, threads=1)
    assert len(measured) == 5
    assert sum(cost.forward for cost in measured) > 0 < sum(cost.backward for cost in measured)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_every_pass_has_its_own_target() -> None:
    """A loss may change it, its containers too, as in training."""

    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output, target.pop("labels").remainder_(2))

    target = {"labels": BATCH[1] + 4}
    before = target["labels"].clone()
    measure([nn.Linear(FEATURES, CLASSES).double()], (BATCH[0], target), loss, threads=1)
    assert torch.equal(target["labels"], before)


def test_bytes_of_a_chain() -> None:
    """By hand: float64, 8 samples, 6 features, 10 between."""
    layers = [
        nn.Linear(FEATURES, 10).double(),
        nn.Tanh(),
        nn.Linear(10, 10, bias=False).double().requires_grad_(False),
        nn.ReLU(inplace=True),
        nn.Linear(10, CLASSES).double(),
    ]
    first, tanh, frozen, relu, last = measure(layers, BATCH, CROSS_ENTROPY, threads=1)
    wide = 8 * 10 * 8
    # 60 weights lie in 512 bytes, 10 biases in 128: whole lines of a cache.
    assert bytes_of(first) == {
        "parameter_bytes": 512 + 128,
        "input_bytes": 8 * FEATURES * 8,
        "output_bytes": wide,
        "kept_input_bytes": 8 * FEATURES * 8,
    }
    through = {"input_bytes": wide, "output_bytes": wide, "error_bytes": wide}
    # Tanh keeps its output; a layer that is not trained needs none of its input.
    assert bytes_of(tanh) == {**through, "saved_bytes": wide, "kept_output_bytes": wide}
    assert bytes_of(frozen) == {**through, "fixed_bytes": 800}
    # In place: what it keeps is its output, and in a stage of its own a copy of its input.
    assert bytes_of(relu) == {**through, "saved_bytes": wide, "kept_output_bytes": wide}
    assert last.kept_input_bytes == 0  # ReLU keeps it
    assert last.output_bytes == 8  # the loss
    # Logarithms of probabilities, labels, and the sum of the labels' weights.
    assert last.saved_bytes == 8 * CLASSES * 8 + 8 * 8 + 8


def bytes_of(cost: LayerCost) -> dict[str, int]:
    """What is not 0."""
    return {
        name: value
        for name, value in vars(cost).items()
        if name not in ("forward", "backward") and value
    }


def test_layers_that_take_and_give_several_tensors() -> None:
    layers = [nn.Linear(FEATURES, FEATURES).double(), Fork(), Handing(), Join()]
    first, fork, handing, join = measure(layers, BATCH, F.cross_entropy, threads=1)
    one, order = 8 * FEATURES * 8, 8 * 8
    assert first.kept_output_bytes == 0
    assert fork.kept_input_bytes == one  # of the linear layer
    assert fork.output_bytes == fork.packed_bytes == 2 * one + order
    # It is handed through, and kept here, not there.
    assert fork.kept_output_bytes == one
    assert handing.input_bytes == handing.output_bytes == 2 * one + order
    assert handing.error_bytes == join.error_bytes == 2 * one
    assert handing.kept_input_bytes == one  # of sin
    assert handing.saved_bytes == 0
    # Of its three inputs the product keeps two, and the indexing the order.
    assert join.kept_input_bytes == one + order
    assert join.kept_output_bytes == 0


def test_no_gradient_comes_back_where_none_is_wanted() -> None:
    class Detach(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    layers = [nn.Linear(FEATURES, 5), nn.Tanh(), Detach(), nn.Linear(5, CLASSES)]
    model = nn.Sequential(*layers).double()
    measured = measure(list(model), BATCH, CROSS_ENTROPY, threads=1)
    assert [cost.error_bytes for cost in measured] == [0, 0, 0, 0]
    assert [cost.input_bytes for cost in measured] == [8 * 6 * 8] + [8 * 5 * 8] * 3


def test_a_captured_chain() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            skip = self.a(x)
            return self.c(self.b(skip.relu()) + skip)

    x = torch.randn(2, 8)
    chain = capture(Residual(), x)
    measured = measure(chain.pieces, (x, torch.randint(0, 8, (2,))), CROSS_ENTROPY, threads=1)
    for cut in chain.allowed_cuts():
        crossing = sum(each.nbytes for each in chain.crossing(cut))
        assert measured[cut - 1].output_bytes == measured[cut].input_bytes == crossing
        assert measured[cut].error_bytes == crossing


def test_a_captured_chain_that_works_in_place_keeps_what_its_modules_keep() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    x, y = torch.randn(2, 8), torch.randint(0, 8, (2,))

    def bytes_of(layers: Sequence[nn.Module]) -> list[LayerCost]:
        costs = measure(layers, (x, y), CROSS_ENTROPY, threads=1)
        return [replace(cost, forward=0.0, backward=0.0) for cost in costs]

    assert bytes_of(capture(model, x).pieces) == bytes_of(model)


class Exponential(nn.Module):
    """Autograd keeps what it gives; ``alive``: weak references to that."""

    alive: ClassVar[list[weakref.ref[Tensor]]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x.exp()
        self.alive.append(weakref.ref(kept))
        return kept * 1, x


class Second(nn.Module):
    def forward(self, hop: tuple[Tensor, Tensor]) -> Tensor:
        return hop[1]


class Failing(nn.Module):
    def forward(self, hop: tuple[Tensor, Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("as on a full device")


@pytest.mark.parametrize("behind", [Second, Failing])
def test_what_no_backward_reaches_is_freed(behind: type[nn.Module]) -> None:
    Exponential.alive.clear()
    layers = [nn.Linear(FEATURES, CLASSES).double(), Exponential(), behind()]
    with pytest.raises(torch.OutOfMemoryError) if behind is Failing else nullcontext():
        measure(layers, BATCH, CROSS_ENTROPY, threads=1)
    gc.collect()
    assert Exponential.alive
    assert all(kept() is None for kept in Exponential.alive)


class Clock:
    """Passes of so many seconds, the first of half as many."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def perf_counter(self) -> float:
        return self.now

    def first(self) -> list[object]:
        self.now += self.seconds / 2
        return ["first"]

    def again(self) -> list[object]:
        self.now += self.seconds
        return ["again"]


@pytest.mark.parametrize(
    ("seconds", "passes"), [(0.01, 9), (1.25, 5), (3.0, 3), (4.0, 2), (8.0, 1), (8.5, 0)]
)
def test_long_passes_are_repeated_less(
    seconds: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(costs, "MOST_PASSES", 9)
    monkeypatch.setattr(costs, "time", clock)
    came_to = costs._repeated(clock.first, clock.again)  # type: ignore[arg-type]
    assert came_to == ([["again"]] * passes or [["first"]])


def test_patience_is_for_passes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST_PASSES", 9)
    for seconds, passes in (0.01, 18), (1.25, 10), (8.0, 2):
        clock = Clock(seconds)
        monkeypatch.setattr(costs, "time", clock)
        assert len(costs._repeated(clock.first, clock.again, 2.0)) == passes  # type: ignore[arg-type]


class Ticking:
    """A clock that each reading costs a second, as calls of the autograd engine and waits do."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


class Working(nn.Module):
    """A layer of so many seconds, and twice as many backward."""

    def __init__(self, clock: Ticking, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        y = x * self.weight
        y.register_hook(self.backward)
        return y

    def backward(self, gradient: Tensor) -> None:
        self.clock.now += 2 * self.seconds


def test_what_it_costs_to_measure_is_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LIMIT_SECONDS", 1e9)
    clock = Ticking()
    monkeypatch.setattr(costs, "time", clock)
    monkeypatch.setattr(layer_passes, "time", clock)
    monkeypatch.setattr(whole_pass, "time", clock)
    seconds = [0.0, 2.0, 9.0] * 8
    layers = [nn.Flatten(), *(Working(clock, each) for each in seconds)]
    _, *measured = measure(layers, BATCH, CROSS_ENTROPY, threads=1)
    # Each reads the clock; the chain, with a layer that has no backward, does so once.
    assert [cost.forward for cost in measured] == pytest.approx([s + 1 / 25 for s in seconds])
    assert [cost.backward for cost in measured] == pytest.approx([2 * s + 1 / 24 for s in seconds])


def test_layers_add_up_to_the_chain_whatever_the_excess() -> None:
    assert costs.as_one([1.0, 1.0, 4.0], 3.0, overhead=1.0) == [0.0, 0.0, 3.0]
    assert costs.as_one([1.0, 0.0, 4.0], 3.0, overhead=9.0) == [0.0, 0.0, 3.0]
    assert costs.as_one([2.0, 0.0, 4.0], 4.0, overhead=1.0) == [1.0, 0.0, 3.0]
    assert costs.as_one([2.0, 0.0, 5.0], 2.5, overhead=1.0) == [0.5, 0.0, 2.0]
    assert costs.as_one([1.0, 2.0], 6.0, overhead=1.0) == [2.0, 4.0]
    assert costs.as_one([0.0, 0.0], 1.0, overhead=1.0) == [0.0, 0.0]


def test_the_gradient_of_what_layers_hand_through_is_handed_through() -> None:
    class Watching(Handing):
        """As a layer of a residual block, which the skip passes by."""

        def __init__(self) -> None:
            super().__init__()
            self.places: list[int] = []

        def forward(self, hop: Sequence[Tensor]) -> list[Tensor]:
            one, two, order, *_ = hop
            two.register_hook(lambda gradient: self.places.append(gradient.data_ptr()))
            return super().forward((one, two, order))

    watching = [Watching(), Watching(), Watching()]
    layers = [nn.Linear(FEATURES, FEATURES).double(), Fork(), *watching, Join()]
    measure(layers, BATCH, CROSS_ENTROPY, threads=1)
    places = list(zip(*(layer.places for layer in watching), strict=True))
    assert len(places) == 3  # one by one, and once more with all as one piece
    for each in places:
        assert len(set(each)) == 1


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def test_what_gets_no_gradient_sends_none_down() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.detach()) + NoGradient.apply(x)

    x, y = torch.randn(2, FEATURES), torch.zeros(2, dtype=torch.long)
    first, last = measure([nn.Linear(FEATURES, FEATURES), Last()], (x, y), CROSS_ENTROPY, threads=1)
    assert last.error_bytes == 0
    assert first.backward == 0 < last.backward


def test_measured_at_work() -> None:
    """On another thread, which ends with it, also where it raises; no trace is left."""
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()

    def measure_nothing(stopped: Callable[[], bool]) -> int:
        assert not stopped()
        torch.set_num_threads(1)
        assert threading.current_thread() is not threading.main_thread()
        return 7

    def fail(stopped: Callable[[], bool]) -> int:
        raise LookupError("as it should")

    before = threading.active_count()
    assert measured_at_work(measure_nothing) == 7
    with pytest.raises(LookupError, match="as it should"):
        measured_at_work(fail)
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the passes that are left."""
    monkeypatch.setattr(costs, "MOST_PASSES", 10**6)
    monkeypatch.setattr(costs, "ENOUGH_SECONDS", 600.0)
    monkeypatch.setattr(costs, "LIMIT_SECONDS", 600.0)
    passes = itertools.count()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if next(passes) == 5:
            to = threading.main_thread().ident
            assert to is not None
            signal.pthread_kill(to, signal.SIGINT)  # as the kernel chooses
        return F.cross_entropy(output, target)

    runner = FDGRunner(mlp(), ["cpu"] * 2, loss_fn=loss)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        runner.fit([BATCH])
    assert threading.active_count() == before
