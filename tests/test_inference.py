"""Evaluation and prediction over the stages are those of the plain model, batch after batch."""

from __future__ import annotations

import copy
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from chains import Batch, batches, convolutional, even_split, images, mlp, same_bits
from in_thread import in_thread
from nests import KINDS, nested
from plain import agrees, plain_evaluation, plain_outputs
from torch import Tensor, nn
from torch.nn import functional as F
from traps import Scene, TroubleError
from versions import LAYERS, parameters, runner_of, state

from fdg_cuda import Evaluation, FDGRunner
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


@pytest.mark.parametrize("delays", [(0, 0), (1, 500), (2, 500)], ids=str)
@pytest.mark.parametrize(
    ("stages", "method"), [(1, "fdg"), (2, "bp"), (2, "fdg"), (3, "ddg"), (4, "fdg")]
)
def test_agrees_with_the_plain_model_whatever_the_timing(
    stages: int, method: str, delays: tuple[int, int]
) -> None:
    model, data = mlp(), batches(12)
    runner = runner_of(model, stages, method=method)
    runner._machine.injected_delays = delays  # type: ignore[attr-defined]
    before = state(model)
    assert agrees(runner.evaluate(data), plain_evaluation(model, data))
    found, expected = list(runner.predict_batches(data)), plain_outputs(model, data)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same_bits(state(model), before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in parameters(model))
    assert not any(output.requires_grad for output in found)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_batches(count: int) -> None:
    model, data = mlp(), batches(count)
    runner = runner_of(model, 4)
    assert agrees(runner.evaluate(data), plain_evaluation(model, data))
    assert len(list(runner.predict_batches(data))) == count


@pytest.mark.parametrize("kind", KINDS)
def test_nested_inputs_and_targets(kind: str) -> None:
    model, data, loss = nested(kind, batches(8))
    runner = runner_of(model, 3, loss_fn=loss)
    assert agrees(runner.evaluate(data), plain_evaluation(model, data, loss))
    expected = plain_outputs(model, data)
    for found in (
        runner.predict_batches(data),
        runner.predict_batches((x, None) for x, _ in data),
        (runner.predict(x) for x, _ in data),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layers_in_place_and_images() -> None:
    data = images(6, channels_last=True)
    model = nn.Sequential(nn.ReLU(inplace=True), *convolutional())
    runner = runner_of(model, 3, split=[1, 3])  # stages begin in place, too
    before = copy.deepcopy(data)
    assert agrees(runner.evaluate(data), plain_evaluation(model, data))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, before, strict=True))


class Meet(nn.Module):
    """Goes on only when another stage is at work as well."""

    def __init__(self, barrier: threading.Barrier, first: int) -> None:
        super().__init__()
        self.barrier = barrier
        self.first = first
        self.batch = -1
        self.seen: list[tuple[int, int]] = []  # thread, its intra-op threads

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.first <= self.batch < self.first + 3:
            self.barrier.wait(10)
        self.seen.append((threading.get_ident(), torch.get_num_threads()))
        return x


@pytest.mark.usefixtures("four_torch_threads")
def test_stages_work_at_the_same_time_each_with_its_share_of_the_cores() -> None:
    barrier = threading.Barrier(2)
    model = nn.Sequential(Meet(barrier, 3), *mlp(layers=4), Meet(barrier, 2))
    runner, callers = runner_of(model, 2), []

    def evaluate() -> None:
        callers.append(threading.get_ident())
        runner.evaluate(batches(8))

    # In a thread of its own, with which its pool of intra-op threads ends.
    in_thread(evaluate).join()
    for meet in (model[0], model[-1]):
        assert isinstance(meet, Meet)
        (first, _), *rest = meet.seen
        assert [first] == callers  # the first batch, to see whether it draws random numbers
        assert {threads for _, threads in rest} == {2}
        assert len({ident for ident, _ in meet.seen}) == 2
    assert model[0].seen[-1] != model[-1].seen[-1]  # type: ignore[union-attr, index]
    assert torch.get_num_threads() == 4


class Draws(nn.Module):
    """Dropout in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


def test_random_numbers_are_drawn_as_by_the_plain_model() -> None:
    """They are the results', and so is the generator's state afterwards."""
    layers = list(mlp())
    model = nn.Sequential(layers[0], Draws(), *layers[1:-1], Draws(), layers[-1])
    runner, data = runner_of(model, 3), batches(9)
    runner._machine.injected_delays = (1, 300)  # type: ignore[attr-defined]
    torch.manual_seed(5)
    expected = plain_evaluation(model, data)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    assert agrees(runner.evaluate(data), expected)
    assert torch.equal(torch.get_rng_state(), after)


class Sometimes(nn.Module):
    """Noise for some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if x[0, 0] > 5 else x


def test_random_numbers_of_later_batches_only_do_not_depend_on_timing() -> None:
    """The first batch drew none, so the stages are at work side by side."""
    runner = runner_of(nn.Sequential(nn.Flatten(), Sometimes(), nn.Linear(6, 6), Sometimes()), 2)
    data = [torch.zeros(4, 6)] + [torch.full((4, 6), 50.0)] * 6

    def noisy(seed: int, delay: int) -> Tensor:
        runner._machine.injected_delays = (delay, 3000)  # type: ignore[attr-defined]
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outputs = torch.stack(list(runner.predict_batches(data)))
        assert torch.equal(torch.get_rng_state(), before)
        return outputs

    expected = noisy(1, 1)
    assert len(expected[1:].unique(dim=0)) == 6
    for delay in range(2, 7):
        assert torch.equal(noisy(1, delay), expected)
    assert not torch.equal(noisy(2, 1), expected)


def test_the_generator_is_left_alone_by_a_model_that_draws_nothing() -> None:
    runner, data = runner_of(mlp(), 3), batches(9)
    before = torch.get_rng_state()
    runner.evaluate(data)
    list(runner.predict_batches(data))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_in_on_epoch(method: str) -> None:
    """Training goes on to the bit as without; figures are those of the weights of the moment."""
    model, twin, data = mlp(), mlp(), batches(6)
    runner_of(twin, 3, method=method).fit(data, epochs=3)
    runner = runner_of(model, 3, method=method)
    found: list[Evaluation] = []

    def look(_: object) -> None:
        found.append(runner.evaluate(data))
        assert agrees(found[-1], plain_evaluation(model, data))
        assert len(list(runner.predict_batches(data))) == 6
        assert all(module.training for module in model.modules())

    runner.fit(data, epochs=3, on_epoch=look)
    assert len({result.loss for result in found}) == 3
    assert same_bits(state(model), state(twin))


@pytest.mark.parametrize("batch", [0, 4])
@pytest.mark.parametrize("place", ["forward 0", "forward 1", "forward 2", "loss", "loader"])
def test_exceptions_of_user_code(
    place: str, batch: int, no_thread_left: Callable[[], None]
) -> None:
    scene = Scene()
    before = state(scene.model)
    runner = scene.runner()
    scene.set(place, batch)
    with pytest.raises(TroubleError, match=place.split()[0]) as caught:
        runner.evaluate(scene.loader)
    no_thread_left()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].name == "raise_in_user_code"
    if place != "loader" and hasattr(caught.value, "__notes__"):
        (note,) = caught.value.__notes__
        assert f"batch {batch}" in note
        assert ("loss" in note) == (place == "loss")
    assert all(module.training for module in scene.model.modules())
    assert same_bits(state(scene.model), before)
    scene.disarm()
    assert runner.evaluate(scene.loader).samples == 6 * 8 + 3
    runner.fit(scene.loader)


def test_loss_that_is_no_scalar() -> None:
    runner = runner_of(mlp(), 2, loss_fn=lambda output, target: output)
    with pytest.raises(TypeError, match=r"scalar tensor.*\(8, 4\)"):
        runner.evaluate(batches(2))


@pytest.mark.parametrize("stages", [1, 3])
def test_ctrl_c(stages: int, no_thread_left: Callable[[], None]) -> None:
    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(batches(20)):
            if number == 7:
                signal.raise_signal(signal.SIGINT)
            yield batch

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = mlp()
        runner = runner_of(model, stages)
        with pytest.raises(KeyboardInterrupt):
            runner.evaluate(loader())
        no_thread_left()
        with pytest.raises(KeyboardInterrupt):
            list(runner.predict_batches(loader()))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert all(module.training for module in model.modules())
        with pytest.raises(KeyboardInterrupt):
            runner.fit(batches(3), on_epoch=lambda _: runner.evaluate(loader()))
        runner.evaluate(batches(3))
    finally:
        signal.signal(signal.SIGINT, previous)


def test_in_another_thread() -> None:
    model, data, found = mlp(), batches(6), []
    runner = runner_of(model, 3)
    in_thread(lambda: found.append(runner.evaluate(data))).join()
    assert agrees(found[0], plain_evaluation(model, data))


def test_the_callers_settings_hold() -> None:
    """Torch keeps them per thread."""
    model, data = mlp().float(), [(x.float(), y) for x, y in batches(4)]
    runner = runner_of(model, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {output.dtype for output in runner.predict_batches(data)} == {torch.bfloat16}
    with torch.inference_mode():
        assert all(output.is_inference() for output in runner.predict_batches(data))
        runner.evaluate(data)


def test_layers_replaced_since() -> None:
    model = mlp()
    runner = runner_of(model)
    model[3] = nn.Identity()
    for use in (runner.evaluate, runner.predict_batches):
        with pytest.raises(RuntimeError, match="make a new FDGRunner"):
            use(batches(2))


# -- predict_batches -----------------------------------------------------------------------------


def test_batches_are_read_a_bounded_number_ahead() -> None:
    read = 0

    def loader() -> Iterator[Batch]:
        nonlocal read
        for batch in batches(60):
            read += 1
            yield batch

    for count, _ in enumerate(runner_of(mlp(), 3).predict_batches(loader()), 1):
        assert read - count <= 8
    assert count == 60


@pytest.mark.parametrize("stages", [1, 3])
def test_inputs_alone_or_in_pairs(stages: int) -> None:
    model, data = mlp(), batches(5)
    runner, expected = runner_of(model, stages), plain_outputs(model, data)
    alone = [x for x, _ in data]
    for loader in (data, alone, ([x] for x in alone), [(x, None) for x in alone]):
        found = list(runner.predict_batches(loader))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list(runner.predict_batches([])) == []


def test_what_cannot_be_predicted() -> None:
    runner, (x, y) = runner_of(mlp(), 2), batches(1)[0]
    for loader, error, words in (
        (5, TypeError, "iterable"),
        (x, TypeError, r"runner.predict\(x\)"),
        ([(x, y, y)], TypeError, r"batch 0: .* a tuple of 3.*\(input, None\)"),
        ([x, x.numpy()], TypeError, "batch 1: the input .*ndarray.*as_tensor"),
        ([x, x[:0]], ValueError, "batch 1: the input holds no samples"),
    ):
        with pytest.raises(error, match=words):
            list(runner.predict_batches(loader))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="predict_batches"):
        runner.predict(iter([x]))


@pytest.mark.parametrize("end", ["close", "drop"])
def test_an_iterator_left_before_its_end(end: str, no_thread_left: Callable[[], None]) -> None:
    model, data = mlp(), batches(9)
    runner = runner_of(model, 3)
    outputs: Any = runner.predict_batches(data)
    next(outputs)
    next(outputs)
    for refused in (lambda: runner.fit(data), lambda: list(runner.predict_batches(data))):
        with pytest.raises(RuntimeError, match=r"predict_batches is at work.*close\(\)"):
            refused()
    assert runner.evaluate(data).samples == 8 * 8 + 3
    assert torch.equal(next(outputs), plain_outputs(model, data)[2])
    if end == "close":
        outputs.close()
    else:
        del outputs
    no_thread_left()
    assert all(module.training for module in model.modules())
    runner.fit(data)


def test_an_iterator_left_open_by_on_epoch() -> None:
    model, data, kept = mlp(), batches(9), []
    runner = runner_of(model, 3)

    def leave(_: object) -> None:
        outputs = runner.predict_batches(data)
        next(outputs)
        kept.append(outputs)

    with pytest.raises(RuntimeError, match="predict_batches is at work"):
        runner.fit(data, epochs=2, on_epoch=leave)
    kept.clear()
    assert len(runner.fit(data).batch_losses) == 9


def test_before_the_model_is_cut() -> None:
    model, data = mlp(), batches(4)
    runner = FDGRunner(model, ["cpu", "cpu"])
    assert agrees(runner.evaluate(data), plain_evaluation(model, data))
    assert len(list(runner.predict_batches(data))) == 4
    assert runner.split is None
    assert even_split(LAYERS, 2) == [4]
