"""What may be called, and when: during ``fit``, from other threads, again."""

from __future__ import annotations

from typing import Any

import pytest
from chains import batches, mlp, same_bits
from versions import (
    runner_of,
    state,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


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
