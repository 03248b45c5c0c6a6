"""An exception of the user's code comes out of ``fit`` as it was raised, and nothing is left running."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable

import pytest
from chains import batches, even_split, largest_difference, mlp, oracle, same_bits
from torch import Tensor, nn
from traps import Scene, TroubleError, raise_in_user_code
from versions import (
    LAYERS,
    TOLERANCE,
    check_versions,
    oracle_of,
    parameters,
    runner_of,
    state,
    versions,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@pytest.mark.parametrize(
    ("place", "note"),
    [
        ("forward 1", "(in the forward of batch 3 at stage 1)"),
        ("backward 2", "(in the backward of batch 3 at stage 2)"),
        ("loss", "(in the loss of batch 3)"),
    ],
)
def test_exceptions_say_where_they_happened(place: str, note: str) -> None:
    scene = Scene()
    scene.set(place, 3)
    with pytest.raises(TroubleError) as caught:
        scene.runner().fit(scene.loader)
    assert caught.value.__notes__ == [note]
