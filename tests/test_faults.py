"""What happens when something goes wrong, or is asked for at a bad moment, while a runner trains.

Every exception comes out of ``fit`` as it was raised, no thread is left (fixture ``no_thread_left``),
every stage holds one of the weight versions of an untroubled run, and ``fit`` works again.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import gc
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from chains import Batch, batches, even_split, largest_difference, mlp, oracle, same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import fdg_cuda
from fdg_cuda import BatchResult, FDGRunner, NonFiniteLossError, reference
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

TOLERANCE = 1e-10  # float64, relative
LAYERS = 8

State = dict[str, Tensor]


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Parallel regions over tiny tensors take milliseconds each where others use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


def runner_of(model: nn.Sequential, stages: int = 2, **options: Any) -> FDGRunner:
    settings = {"split": even_split(len(model), stages), "lr": 0.05, **options}
    return FDGRunner(model, ["cpu"] * stages, **settings)


def state(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def versions(
    model: nn.Sequential, split: list[int], data: list[Batch], **options: Any
) -> list[list[Tensor]]:
    """Per stage its flat weights after 0, 1, 2, ... updates of an uninterrupted run of the oracle,
    which asks for the loss of batch b when every stage has made b updates."""
    whole = copy.deepcopy(model)
    bounds = [0, *split, len(model)]
    stages = [nn.Sequential(*whole[a:b]) for a, b in pairwise(bounds)]
    kept: list[list[Tensor]] = [[] for _ in stages]

    def keep() -> None:
        for stage, versions_of_stage in zip(stages, kept, strict=True):
            versions_of_stage.append(flat(stage))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        keep()
        return F.cross_entropy(output, target)

    reference.train(stages, data, loss_fn=loss, **{"lr": 0.05, **options})
    keep()
    return kept


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def check_versions(model: nn.Sequential, split: list[int], known: list[list[Tensor]]) -> list[int]:
    """Every stage of ``model`` holds exactly one of its known versions; returns their numbers."""
    found = []
    for (a, b), of_stage in zip(pairwise([0, *split, len(model)]), known, strict=True):
        weights = flat(model[a:b])
        distances = [float((weights - version).abs().max()) for version in of_stage]
        assert min(distances) < TOLERANCE, f"layers {a} to {b - 1} hold no whole version"
        found.append(distances.index(min(distances)))
    return found


# -- exceptions of the user's code ----------------------------------------------------------------


class TroubleError(Exception):
    """Raised by the user's code."""


class Trap(nn.Module):
    """Passes its input on, until the forward or backward of batch ``at`` raises."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_at = self.backward_at = -1
        self.batch = 0

    def forward(self, x: Tensor) -> Tensor:
        batch, self.batch = self.batch, self.batch + 1
        if batch == self.forward_at:
            raise_in_user_code(f"forward {batch}")
        result: Tensor = TrappedIdentity.apply(x, batch == self.backward_at)
        return result


class TrappedIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, raises: bool) -> Tensor:
        ctx.raises = raises
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.raises:
            raise_in_user_code("backward")
        return gradient, None


def raise_in_user_code(where: str) -> None:
    raise TroubleError(where)


class TrappedLoss:
    def __init__(self) -> None:
        self.at = -1
        self.batch = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        batch, self.batch = self.batch, self.batch + 1
        if batch == self.at:
            raise_in_user_code(f"loss {batch}")
        return F.cross_entropy(output, target)


class TrappedLoader:
    def __init__(self, data: list[Batch]) -> None:
        self.data = data
        self.at = -1

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.data):
            if number == self.at:
                raise_in_user_code(f"loader {number}")
            yield batch


class Scene:
    """A chain with a trap in the middle of each of three stages, a loss and a loader with traps."""

    split = (4, 8)

    def __init__(self, count: int = 7) -> None:
        layers = list(mlp(layers=9))
        self.traps = [Trap(), Trap(), Trap()]
        for position, trap in zip((8, 5, 2), reversed(self.traps), strict=True):
            layers.insert(position, trap)
        self.model = nn.Sequential(*layers)
        self.loss = TrappedLoss()
        self.loader = TrappedLoader(batches(count))

    def runner(self, model: nn.Sequential | None = None, **options: Any) -> FDGRunner:
        settings = {"split": list(self.split), "loss_fn": self.loss, **options}
        return runner_of(self.model if model is None else model, 3, **settings)

    def set(self, place: str, batch: int) -> None:
        kind, _, stage = place.partition(" ")
        if kind == "forward":
            self.traps[int(stage)].forward_at = batch
        elif kind == "backward":
            self.traps[int(stage)].backward_at = batch
        else:
            {"loss": self.loss, "loader": self.loader}[kind].at = batch

    def disarm(self) -> None:
        for trap in self.traps:
            trap.forward_at = trap.backward_at = -1
        self.loss.at = self.loader.at = -1


PLACES = [f"{kind} {stage}" for kind in ("forward", "backward") for stage in range(3)]


@pytest.mark.parametrize("batch", [0, 3], ids=["first-batch", "middle-batch"])
@pytest.mark.parametrize("place", [*PLACES, "loss", "loader"])
def test_exception_of_user_code_comes_out_of_fit(
    place: str, batch: int, no_thread_left: Callable[[], None]
) -> None:
    scene = Scene()
    initial, own = state(scene.model), parameters(scene.model)
    known = versions(scene.model, list(scene.split), scene.loader.data, momentum=0.0)
    # Without momentum nothing but weights and buffers may survive into the next fit.
    runner = scene.runner(momentum=0.0)
    for trap in scene.traps:
        trap.batch = 0
    scene.set(place, batch)
    with pytest.raises(TroubleError, match=place.split()[0]) as caught:
        runner.fit(scene.loader)
    no_thread_left()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "raise_in_user_code"
    assert type(caught.value) is TroubleError
    check_versions(scene.model, list(scene.split), known)
    assert all(a is b for a, b in zip(parameters(scene.model), own, strict=True))
    assert all(p.isfinite().all() and p.requires_grad for p in own)

    scene.disarm()
    again = copy.deepcopy(scene.model)
    again.load_state_dict(initial)
    expected, _ = oracle(again, list(scene.split), scene.loader.data, lr=0.05, momentum=0.0)
    fresh = scene.runner(again, momentum=0.0)
    runner.load_state_dict(initial)
    for name, troubled in (("new runner", fresh), ("same runner", runner)):
        troubled.fit(scene.loader)
        assert largest_difference(troubled.state_dict(), expected) < TOLERANCE, name


@pytest.mark.parametrize("place", ["forward 1", "backward 1", "loss", "loader"])
def test_exception_while_the_layers_are_measured(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch finds out where to cut; a fault there leaves no trace either."""
    monkeypatch.setenv("FDG_CACHE_DIR", "")
    monkeypatch.setattr("fdg_cuda.layer_times._known", {})
    scene = Scene()
    initial, own = state(scene.model), parameters(scene.model)
    runner = scene.runner(split=None)
    scene.set(place, 0)
    with pytest.raises(TroubleError, match=place.split()[0]):
        runner.fit(scene.loader)
    assert same_bits(state(scene.model), initial)
    assert all(a is b and a.grad is None for a, b in zip(parameters(scene.model), own, strict=True))
    scene.disarm()
    assert len(runner.fit(scene.loader).batch_losses) == 7


def test_exception_in_a_later_epoch() -> None:
    scene = Scene(count=4)
    runner = scene.runner()
    scene.set("forward 1", 6)
    with pytest.raises(TroubleError, match="forward 6"):
        runner.fit(scene.loader, epochs=3)
    scene.disarm()
    runner.fit(scene.loader)


@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_with_a_meaning_of_their_own(error: type[BaseException]) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("of the user")

    model = nn.Sequential(*mlp(), Raises())
    with pytest.raises(error, match="of the user"):
        runner_of(model).fit(batches(4))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("where", ["on_batch", "on_epoch", "scheduler-epoch", "scheduler-batch"])
def test_exception_in_a_callback(
    where: str, epoch: int, no_thread_left: Callable[[], None]
) -> None:
    class Callback:
        calls = 0

        def __call__(self, *_: object) -> None:
            self.calls += 1
            if self.calls == epoch * (5 if where in ("on_batch", "scheduler-batch") else 1) + 1:
                raise_in_user_code(where)

        step = __call__

    model = mlp()
    initial = state(model)
    split = even_split(LAYERS, 3)
    known = versions(model, split, batches(5), epochs=2, momentum=0.0)
    runner = runner_of(model, 3, momentum=0.0)
    callback = Callback()
    if where.startswith("scheduler"):
        options = {"lr_scheduler": callback, "lr_step": where.partition("-")[2]}
    else:
        options = {where: callback}
    with pytest.raises(TroubleError, match=where):
        runner.fit(batches(5), epochs=2, **options)
    no_thread_left()
    found = check_versions(model, split, known)
    if where.endswith("epoch"):  # nothing runs there: the epoch's work is whole
        assert found == [5 * (epoch + 1)] * 3
    runner.load_state_dict(initial)
    runner.fit(batches(5))
    expected, _ = oracle_of(initial, split, batches(5), momentum=0.0)
    assert largest_difference(state(model), expected) < TOLERANCE


def oracle_of(
    initial: State, split: list[int], data: list[Batch], **options: Any
) -> tuple[State, reference.ReferenceResult]:
    model = mlp()
    model.load_state_dict(initial)
    return oracle(model, split, data, **{"lr": 0.05, **options})


# -- calls at a bad moment --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict", "state_dict", "load_state_dict"])
@pytest.mark.parametrize("where", ["on_batch", "on_epoch"])
def test_calls_from_within_a_callback(where: str, call: str) -> None:
    """With batches at work all are refused; between two epochs all but fit are fine."""
    model, data = mlp(), batches(5)
    runner = runner_of(model)
    saved = state(model)
    arguments: dict[str, tuple[Any, ...]] = {
        "fit": (data,),
        "evaluate": (data,),
        "predict": (data[0][0],),
        "state_dict": (),
        "load_state_dict": (saved,),
    }
    called = 0

    def callback(_: object) -> None:
        nonlocal called
        getattr(runner, call)(*arguments[call])
        called += 1

    if where == "on_epoch" and call != "fit":
        runner.fit(data, epochs=2, on_epoch=callback)
        assert called == 2
    else:
        with pytest.raises(RuntimeError, match=f"{call} was called while fit is running.*on_epoch"):
            runner.fit(data, epochs=2, **{where: callback})
    runner.fit(data)
    runner.evaluate(data)


def test_refused_call_that_the_callback_catches() -> None:
    """The fit under way goes on as if nothing had been asked."""
    model, twin = mlp(), mlp()
    runner = runner_of(model)
    refusals = 0

    def callback(_: object) -> None:
        nonlocal refusals
        try:
            runner.fit(batches(2))
        except RuntimeError:
            refusals += 1

    runner.fit(batches(5), epochs=2, on_batch=callback, on_epoch=callback)
    runner_of(twin).fit(batches(5), epochs=2)
    assert refusals == 12
    assert same_bits(state(model), state(twin))


def test_evaluation_between_epochs_changes_no_bit() -> None:
    model, twin = mlp(), mlp()
    runner = runner_of(model, 3)
    found = []

    def callback(_: object) -> None:
        found.append(runner.evaluate(batches(3, seed=9)).loss)

    runner.fit(batches(5), epochs=3, on_epoch=callback)
    runner_of(twin, 3).fit(batches(5), epochs=3)
    assert same_bits(state(model), state(twin))
    assert found[-1] == runner.evaluate(batches(3, seed=9)).loss
    assert len(set(found)) == 3


# -- Ctrl-C -----------------------------------------------------------------------------------------


class Slow(nn.Module):
    """Takes a while, so that ticks are longer than the reaction to a signal; counts forwards."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.count = 0
        self.busy = threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        time.sleep(self.seconds)
        if self.count == 6:
            self.busy.set()
        return x


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler for Ctrl-C, whatever the test run was started under."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stages", "method", "how"),
    [
        (2, "fdg", "raise_signal"),
        (2, "fdg", "interrupt_main"),
        (2, "fdg", "kill"),
        (1, "fdg", "raise_signal"),
        (3, "fdg", "raise_signal"),
        (3, "ddg", "raise_signal"),
    ],
)
def test_ctrl_c_while_training(
    how: str, stages: int, method: str, no_thread_left: Callable[[], None]
) -> None:
    model, data = mlp(), batches(40, last=None)
    split = even_split(LAYERS, stages)
    known = versions(model, split, data, method=method)
    first, last = Slow(0.01), Slow(0.01)
    chain = nn.Sequential(first, *model[:-1], nn.Sequential(model[-1], last))
    at_signal = []

    def interrupt() -> None:
        if not last.busy.wait(10):
            return
        if how == "raise_signal":
            signal.raise_signal(signal.SIGINT)
        elif how == "interrupt_main":
            _thread.interrupt_main()
        else:
            os.kill(os.getpid(), signal.SIGINT)
        at_signal.extend([first.count, last.count])

    runner = runner_of(chain, stages, split=[index + 1 for index in split], method=method)
    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.fit(data)  # takes 0.4 s at least
    thread.join()
    no_thread_left()
    assert first.count <= at_signal[0] + 2
    assert last.count <= at_signal[1] + 2
    found = check_versions(model, split, known)
    assert found[-1] <= at_signal[1] + 2
    assert 0 < max(found) < 20
    # And on it goes from there.
    first.seconds = last.seconds = 0
    assert len(runner.fit(data).batch_losses) == 40


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_the_loader_is_read() -> None:
    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(batches(9)):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            yield batch

    model = mlp()
    known = versions(model, [4], batches(9))
    runner = runner_of(model)
    with pytest.raises(KeyboardInterrupt):
        runner.fit(loader())
    assert max(check_versions(model, [4], known)) <= 5
    runner.fit(batches(3))


SCRIPT = """
import sys, time, torch
from torch import nn
from fdg_cuda import FDGRunner

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.005)
        return x

model = nn.Sequential(nn.Linear(3, 4), Slow(), nn.Linear(4, 2))
data = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 2000
try:
    FDGRunner(model, ["cpu", "cpu"], split=[1]).fit(
        data, on_batch=lambda result: result.batch == 3 and print("busy", flush=True)
    )
finally:
    print("finite", all(p.isfinite().all() for p in model.parameters()), flush=True)
"""


def test_ctrl_c_ends_a_program_as_usual() -> None:
    """A real SIGINT: the traceback of KeyboardInterrupt, and the exit status that shells expect."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fdg_cuda.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert output == "finite True\n"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


class SignalAt:
    """Raises SIGINT at the ``number``-th place of the package's code at which Python looks for
    signals: the entry of a function, and the return from a function in C."""

    package = str(Path(fdg_cuda.__file__).parent)

    def __init__(self, number: int) -> None:
        self.left = number
        self.place = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "c_return") or not code.co_filename.startswith(self.package):
            return
        if code.co_name == "<genexpr>":  # may be on its way to the garbage: Python drops it there
            return
        self.left -= 1
        if self.left == 0:
            self.place = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_any_place_of_the_package(no_thread_left: Callable[[], None]) -> None:
    """Every other place at which Python looks for signals."""
    data = batches(1, last=None)
    initial = state(mlp(layers=4))
    known = versions(mlp(layers=4), [2], data, epochs=2, momentum=0.0)
    expected, _ = oracle(mlp(layers=4), [2], data, epochs=2, lr=0.05, momentum=0.0)
    problems: list[str] = []
    for number in range(1, 100_000, 2):
        model = mlp(layers=4)
        own = parameters(model)
        runner = runner_of(model, momentum=0.0)
        interrupt = SignalAt(number)
        came_out = False
        try:
            sys.setprofile(interrupt)
            runner.fit(data, epochs=2)
        except KeyboardInterrupt:
            came_out = True
        finally:
            sys.setprofile(None)
        if not interrupt.place:
            break
        try:
            assert came_out, "KeyboardInterrupt did not come out of fit"
            no_thread_left()
            same = all(a is b for a, b in zip(parameters(model), own, strict=True))
            assert same, "the caller's parameters are no longer in the model"
            check_versions(model, [2], known)
            runner.load_state_dict(initial)
            runner.fit(data, epochs=2)
            difference = largest_difference(state(model), expected)
            assert difference < TOLERANCE, "the next fit trains something else"
        except (AssertionError, RuntimeError, pytest.fail.Exception) as problem:
            problems.append(f"{interrupt.place}: {str(problem).splitlines()[0]}")
    assert number > 200
    assert not problems, "\n".join([f"{len(problems)} bad places:", *sorted(set(problems))])


# -- losses that are not finite -----------------------------------------------------------------------


class SpoiledLoss:
    """Becomes ``value`` at the ``at``-th call, counted from 0."""

    def __init__(self, at: int, value: float) -> None:
        self.at, self.value, self.calls = at, value, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        self.calls += 1
        return loss * self.value if self.calls - 1 == self.at else loss


@pytest.mark.parametrize("batch", [0, 2, 4], ids=["first", "middle", "last"])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(("stages", "method"), [(1, "fdg"), (2, "fdg"), (3, "fdg"), (3, "ddg")])
def test_loss_that_is_not_finite(stages: int, method: str, epoch: int, batch: int) -> None:
    """The model goes back to the end of the last finite epoch, and so does the momentum."""
    data, value = batches(5), (math.nan, math.inf)[batch == 4]
    model, twin = mlp(), mlp()
    own = parameters(model)
    loss_fn = SpoiledLoss(5 * epoch + batch, value)
    runner = runner_of(model, stages, method=method, loss_fn=loss_fn)
    untroubled = runner_of(twin, stages, method=method)
    untroubled.fit(data, epochs=epoch)

    with pytest.raises(NonFiniteLossError, match=f"batch {batch} of epoch {epoch}") as caught:
        runner.fit(data, epochs=4)
    assert (caught.value.epoch, caught.value.batch) == (epoch, batch)
    assert not math.isfinite(caught.value.loss)
    assert "smaller lr" in str(caught.value)
    assert same_bits(state(model), state(twin))
    assert all(a is b for a, b in zip(parameters(model), own, strict=True))

    for each in (runner, untroubled):
        each.optimizer.param_groups[0]["lr"] = 0.01
    losses = runner.fit(data, epochs=2).batch_losses
    assert losses == untroubled.fit(data, epochs=2).batch_losses
    assert same_bits(state(model), state(twin))


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_overflow_behind_the_last_finite_loss(epochs: int) -> None:
    """The losses of this epoch are finite, the weights its last updates leave are not. The model
    must not be left with them, whether another epoch follows or not."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4)).double()
    initial = state(model)
    runner = FDGRunner(model, ["cpu"], lr=1e308)
    with pytest.raises(NonFiniteLossError):
        runner.fit([(1e4 * x, y) for x, y in batches(1, last=None)], epochs=epochs)
    assert same_bits(state(model), initial)


def test_loss_that_is_not_finite_with_a_buffer_that_was_made_meanwhile() -> None:
    class Lazy(nn.Module):
        scale: Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.ones_like(x[0])
            return x * self.scale

    model = nn.Sequential(Lazy(), *mlp())
    runner = runner_of(model, loss_fn=SpoiledLoss(1, math.nan))
    with pytest.raises(NonFiniteLossError, match="batch 1 of epoch 0"):
        runner.fit(batches(3))
    runner.fit(batches(3))


# -- what lasts from one fit to the next ----------------------------------------------------------------


@pytest.mark.parametrize("whose", ["model", "runner"])
def test_load_state_dict_between_fits(whose: str) -> None:
    model, data = mlp(), batches(5)
    initial = state(model)
    runner = runner_of(model, 3, momentum=0.0)
    runner.fit(data, epochs=2)
    trained = state(model)
    assert not same_bits(trained, initial)
    (model if whose == "model" else runner).load_state_dict(initial)
    assert same_bits(state(model), initial)
    runner.fit(data, epochs=2)
    assert same_bits(state(model), trained)


def test_weights_changed_in_place_between_epochs() -> None:
    """In on_epoch, and by data= between fits: what the caller sets is what is trained."""
    model, split = mlp(), even_split(LAYERS, 3)
    runner = runner_of(model, 3, momentum=0.0)
    initial = state(model)
    runner.fit(batches(5), epochs=2, on_epoch=lambda _: model.load_state_dict(initial))
    for p in parameters(model):
        p.data = p.data.clone() * 0.5
    expected, _ = oracle_of(state(model), split, batches(5), momentum=0.0)
    runner.fit(batches(5))
    assert largest_difference(state(model), expected) < TOLERANCE


def test_layer_replaced_between_fits_is_not_passed_over() -> None:
    """Either the new layer is trained, or the runner says that it cannot."""
    model = mlp()
    runner = runner_of(model)
    runner.fit(batches(3))
    model[7] = nn.Linear(12, 4).double()
    before = state(model[7])
    try:
        runner.fit(batches(3))
    except (RuntimeError, ValueError):
        return
    assert not same_bits(state(model[7]), before)


@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_two_fits_of_one_epoch_equal_one_of_two(
    stages: int, method: str, backward_weights: str
) -> None:
    """Momentum lasts."""
    model, twin = mlp(), mlp()
    options = {"method": method, "backward_weights": backward_weights}
    runner = runner_of(model, stages, **options)
    losses = runner.fit(batches(5)).batch_losses + runner.fit(batches(5)).batch_losses
    once = runner_of(twin, stages, **options).fit(batches(5), epochs=2)
    assert losses == once.batch_losses
    assert same_bits(state(model), state(twin))


@pytest.mark.parametrize("stages", [1, 3])
def test_callers_parameters_hold_the_trained_weights(stages: int) -> None:
    model = mlp()
    model[2].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    own = dict(model.named_parameters())
    wanted = {name: p.requires_grad for name, p in own.items()}
    before = state(model)
    runner = runner_of(model, stages)
    runner.fit(batches(5), epochs=2)
    now = dict(model.named_parameters())
    assert own.keys() == now.keys()
    for name, parameter in now.items():
        assert parameter is own[name]
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad is wanted[name]
        assert parameter.is_leaf
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) is not wanted[name]
    assert same_bits(runner.state_dict(), state(model))


def test_model_can_be_copied_and_saved_after_fit() -> None:
    model = mlp()
    runner = runner_of(model, 3)
    runner.fit(batches(5))
    trained = state(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 3 * sum(v.nbytes for v in trained.values()) + 20_000
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": mlp(seed=2),
    }
    copies["torch.save"].load_state_dict(torch.load(file))
    runner.fit(batches(5))
    assert not same_bits(state(model), trained)
    for how, made in copies.items():
        assert same_bits(state(made), trained), f"{how}: the copy changed with the original"
        runner_of(made).fit(batches(2))


@pytest.mark.parametrize("how", ["trained", "failed", "interrupted", "unused"])
def test_deleting_the_runner_frees_everything(how: str) -> None:
    model = mlp()

    def callback(_: object) -> None:
        if how == "failed":
            raise TroubleError
        if how == "interrupted":
            raise KeyboardInterrupt

    def train(data: list[Batch]) -> list[weakref.ref[Any]]:
        runner = runner_of(model, 3)
        if how != "unused":
            with contextlib.suppress(TroubleError, KeyboardInterrupt):
                runner.fit(data, epochs=2, on_batch=callback)
        memory = [stage.memory for stage in runner.stages]
        flat_weights = [copy for each in memory for copy in (*each.weights, each.momentum)]
        return [weakref.ref(x) for x in (runner, runner.optimizer, *runner.stages, *flat_weights)]

    data = batches(5)
    inputs = [weakref.ref(x) for x, _ in data]
    left = train(data)
    gc.collect()
    assert [x() for x in left if x() is not None] == []
    del data
    assert [x() for x in inputs if x() is not None] == []
    assert all(p.isfinite().all() for p in parameters(model))


# -- evaluate, predict, history -----------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True], ids=["before-training", "after-training"])
def test_evaluate_and_predict_change_nothing(trained: bool) -> None:
    model, data = mlp(), batches(4)
    runner = runner_of(model, split=None)
    if trained:
        runner.fit(data)
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = state(model)
    found = runner.evaluate(data)
    outputs = torch.cat([runner.predict(x) for x, _ in data])
    assert [module.training for module in model.modules()] == modes
    assert same_bits(state(model), before)
    assert not outputs.requires_grad
    assert all(p.grad is None for p in parameters(model))

    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = torch.cat([plain(x) for x, _ in data])
    assert torch.equal(outputs, expected)
    targets = torch.cat([y for _, y in data])
    assert found.samples == len(targets) == 27
    assert found.loss == pytest.approx(float(F.cross_entropy(expected, targets)), rel=1e-12)
    assert found.accuracy == float((expected.argmax(1) == targets).double().mean())


def test_evaluate_is_weighted_by_samples() -> None:
    """The last batch holds one sample of eight; a mean over batches would count it as a half."""
    model = mlp(batch_norm=False)
    (x, y), (last_x, last_y) = batches(2, size=7, last=1)
    runner = runner_of(model)
    losses = [runner.evaluate([batch]).loss for batch in ((x, y), (last_x, last_y))]
    found = runner.evaluate([(x, y), (last_x, last_y)])
    assert found.loss == pytest.approx((7 * losses[0] + losses[1]) / 8, rel=1e-12)
    assert found.loss != pytest.approx(sum(losses) / 2, rel=1e-3)


def test_evaluate_restores_the_modes_after_an_exception() -> None:
    model = mlp()
    runner = runner_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        runner.evaluate([(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2).long())])
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    runner.fit(batches(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 3])
def test_history_and_on_batch_are_in_batch_order(stages: int, method: str) -> None:
    data, model = batches(6), mlp()
    split = even_split(LAYERS, stages)
    _, recorded = oracle(model, split, data, epochs=2, lr=0.05, method=method)
    reported: list[BatchResult] = []
    runner = runner_of(model, stages, method=method)
    history = runner.fit(data, epochs=2, on_batch=reported.append)
    assert all(type(loss) is float for loss in history.batch_losses)
    assert history.batch_losses == pytest.approx(recorded.losses, rel=TOLERANCE)
    assert [result.loss for result in reported] == history.batch_losses
    assert [(r.epoch, r.batch) for r in reported] == [(e, b) for e in range(2) for b in range(6)]
    assert [r.samples for r in reported] == [8, 8, 8, 8, 8, 3] * 2
    for epoch, result in enumerate(history.epochs):
        mine = reported[6 * epoch : 6 * epoch + 6]
        assert (result.epoch, result.batches, result.samples) == (epoch, 6, 43)
        assert result.loss == pytest.approx(sum(r.loss * r.samples for r in mine) / 43)
        assert result.accuracy == sum(r.correct or 0 for r in mine) / 43


def test_no_epochs() -> None:
    model = mlp()
    before = state(model)
    history = runner_of(model, split=None).fit(batches(2), epochs=0)
    assert history.batch_losses == history.epochs == []
    assert same_bits(state(model), before)


# -- threads and defaults -----------------------------------------------------------------------------


@pytest.fixture
def four_torch_threads(one_torch_thread: None, no_thread_left: None) -> Iterator[None]:
    """Perhaps more than there are cores: what counts here is what is asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_thread(function: Callable[[], None]) -> threading.Thread:
    """Started, and its exception is an error of the test (pytest's filterwarnings)."""
    thread = threading.Thread(target=function)
    thread.start()
    return thread


@pytest.mark.parametrize("stages", [1, 2])
def test_fit_in_another_thread(stages: int) -> None:
    model, twin = mlp(), mlp()
    runner_of(twin, stages).fit(batches(5))
    in_thread(lambda: runner_of(model, stages).fit(batches(5)) and None).join()
    assert same_bits(state(model), state(twin))


def test_exception_in_another_thread() -> None:
    scene = Scene()
    scene.set("backward 1", 3)
    caught: list[BaseException] = []

    def train() -> None:
        try:
            scene.runner().fit(scene.loader)
        except TroubleError as error:
            caught.append(error)

    in_thread(train).join()
    assert len(caught) == 1


@pytest.mark.usefixtures("four_torch_threads")
def test_fits_at_the_same_time_give_the_same_bits_as_alone() -> None:
    models = [(seed, stages) for seed in (1, 2) for stages in (1, 2, 3)]
    alone, together = ([mlp(seed) for seed, _ in models] for _ in range(2))

    def train(model: nn.Sequential, stages: int) -> None:
        runner_of(model, stages).fit(batches(8), epochs=3)

    for model, (_, stages) in zip(alone, models, strict=True):
        train(model, stages)
    threads = [
        in_thread(lambda model=model, stages=stages: train(model, stages))  # type: ignore[misc]
        for model, (_, stages) in zip(together, models, strict=True)
    ]
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert same_bits(state(a), state(b))


class Look(nn.Module):
    """Notes how many threads torch gives its stage; may wait for another runner meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self, x: Tensor) -> Tensor:
        self.threads.add(torch.get_num_threads())
        self.entered.set()
        assert self.go_on.wait(10)
        return x


@pytest.mark.usefixtures("four_torch_threads")
def test_thread_counts_of_torch() -> None:
    """Each stage has its share; the caller, and threads started later, keep theirs."""
    for stages, share in ((1, 4), (2, 2), (3, 1)):
        look = Look()
        runner_of(nn.Sequential(look, *mlp(layers=5)), stages).fit(batches(3))
        assert look.threads == {share}
        assert torch.get_num_threads() == 4
    later: list[int] = []
    in_thread(lambda: later.append(torch.get_num_threads())).join()
    assert later == [4]


@pytest.mark.usefixtures("four_torch_threads")
def test_thread_counts_of_a_fit_that_starts_during_another() -> None:
    """Its share must be what it is alone, or it sums in another order and gives other bits."""
    first, second = Look(), Look()
    first.go_on.clear()

    def train(look: Look) -> None:
        runner_of(nn.Sequential(look, *mlp(layers=5)), 2).fit(batches(3))

    one = in_thread(lambda: train(first))
    assert first.entered.wait(10)
    in_thread(lambda: train(second)).join()
    first.go_on.set()
    one.join()
    later: list[int] = []
    in_thread(lambda: later.append(torch.get_num_threads())).join()
    assert (first.threads, second.threads, later) == ({2}, {2}, [4])


@pytest.mark.parametrize("split", [[3], None], ids=["given-split", "measured-split"])
def test_default_dtype_float64(split: list[int] | None) -> None:
    """Layers and targets made under it, losses in it: one-hot regression against the oracle."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 4),
        )
        data = [(x, F.one_hot(y, 4).to(torch.get_default_dtype())) for x, y in batches(6)]
        runner = runner_of(copy.deepcopy(model), split=split, loss_fn=F.mse_loss)
        history = runner.fit(data)
        assert runner.split is not None
        expected, recorded = oracle(model, runner.split, data, lr=0.05, loss_fn=F.mse_loss)
        assert largest_difference(runner.state_dict(), expected) < TOLERANCE
        assert history.batch_losses == pytest.approx(recorded.losses, rel=TOLERANCE)
        assert history.epochs[0].accuracy is None
        assert runner.evaluate(data).accuracy is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_dtype_float64_does_not_spread_to_float32_models() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = mlp().float()
        runner_of(model).fit([(x.float(), y) for x, y in batches(4)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in parameters(model)} == {torch.float32}


def test_fit_within_no_grad() -> None:
    model, twin = mlp(), mlp()
    with torch.no_grad():
        runner_of(model).fit(batches(4))
    runner_of(twin).fit(batches(4))
    assert same_bits(state(model), state(twin))
