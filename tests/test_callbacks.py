"""The moments of a fit: which are told, in which order, and what may be done in them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from chains import batches, even_split, mlp, oracle, same_bits

from fdg_cuda import BatchResult, Callback, EpochResult, FDGRunner, FitStart, History

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_thread_left")


class Diary(Callback):
    """Writes down every moment."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_fit_start(self, start: FitStart) -> None:
        self.lines.append(f"fit of {start.epochs} from {start.epoch}:{start.batch}")

    def on_epoch_start(self, epoch: int) -> None:
        self.lines.append(f"epoch {epoch}")

    def on_batch_end(self, result: BatchResult) -> None:
        self.lines.append(f"batch {result.epoch}:{result.batch}")

    def on_epoch_end(self, result: EpochResult) -> None:
        self.lines.append(f"end of {result.epoch} after {result.batches}")

    def on_exception(self, error: BaseException) -> None:
        self.lines.append(f"{type(error).__name__}: {error}")

    def on_fit_end(self, history: History) -> None:
        self.lines.append(f"{len(history.epochs)} epochs")


def runner_of(stages: int = 2, **options: Any) -> FDGRunner:
    model = mlp()
    return FDGRunner(
        model, ["cpu"] * stages, split=even_split(len(model), stages), lr=0.05, **options
    )


def test_moments_come_in_order() -> None:
    diary = Diary()
    runner_of().fit(batches(3), epochs=2, callbacks=[diary])
    assert diary.lines == [
        "fit of 2 from 0:0",
        *("epoch 0", "batch 0:0", "batch 0:1", "batch 0:2", "end of 0 after 3"),
        *("epoch 1", "batch 1:0", "batch 1:1", "batch 1:2", "end of 1 after 3"),
        "2 epochs",
    ]


def test_callbacks_are_told_one_after_the_other() -> None:
    order: list[str] = []

    class Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_epoch_end(self, result: EpochResult) -> None:
            order.append(self.name)

    runner_of().fit(
        batches(2), on_epoch=lambda _: order.append("function"), callbacks=[Named("a"), Named("b")]
    )
    assert order == ["function", "a", "b"]


@pytest.mark.parametrize(
    "moment", ["on_fit_start", "on_epoch_start", "on_batch_end", "on_epoch_end"]
)
def test_what_a_callback_raises_ends_the_fit(moment: str) -> None:
    diary = Diary()
    bad = Callback()

    def fail(*_: object) -> None:
        raise LookupError("no such thing")

    setattr(bad, moment, fail)
    runner = runner_of()
    with pytest.raises(LookupError, match="no such thing"):
        runner.fit(batches(6), callbacks=[bad, diary])
    assert diary.lines[-1] == "LookupError: no such thing"
    diary.lines.clear()
    runner.fit(batches(2), callbacks=[diary])
    assert diary.lines[-1] == "1 epochs"


def test_the_runner_may_be_used_in_every_moment_but_a_batchs_end() -> None:
    runner = runner_of()
    data = batches(4)
    used: list[str] = []

    class User(Callback):
        def on_fit_start(self, start: FitStart) -> None:
            self.use("fit start")

        def on_epoch_start(self, epoch: int) -> None:
            self.use("epoch start")

        def on_epoch_end(self, result: EpochResult) -> None:
            self.use("epoch end")

        def on_exception(self, error: BaseException) -> None:
            self.use("exception")

        def on_batch_end(self, result: BatchResult) -> None:
            with pytest.raises(RuntimeError, match="while fit is running"):
                runner.state_dict()
            if result.epoch == 1:
                raise LookupError

        def use(self, moment: str) -> None:
            runner.evaluate(data)
            runner.state_dict()
            used.append(moment)

    with pytest.raises(LookupError):
        runner.fit(data, epochs=2, callbacks=[User()])
    assert used == ["fit start", "epoch start", "epoch end", "epoch start", "exception"]


def test_a_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"instances of subclasses of fdg_cuda\.Callback; got the class Diary"
    ):
        runner_of().fit(batches(2), callbacks=[Diary])  # type: ignore[list-item]


# -- stop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stopped_in_an_epoch_trains_what_had_entered(stages: int) -> None:
    """As if the epoch had ended there: every stage made one update for each batch."""
    runner, data = runner_of(stages), batches(30, last=None)
    diary = Diary()

    def stop(result: BatchResult) -> None:
        if result.batch == 5:
            runner.stop()

    history = runner.fit(data, epochs=3, on_batch=stop, callbacks=[diary])
    trained = len(history.batch_losses)
    assert 6 <= trained < 20
    assert history.epochs == []
    assert diary.lines[-1] == "0 epochs"
    expected, recorded = oracle(mlp(), runner.split or [], data[:trained], lr=0.05)
    assert history.batch_losses == pytest.approx(recorded.losses, rel=1e-10)
    for key, value in runner.state_dict().items():
        assert (value - expected[key]).abs().max() < 1e-10


def test_stopped_after_an_epoch() -> None:
    runner = runner_of()
    history = runner.fit(batches(4), epochs=5, on_epoch=lambda _: runner.stop())
    assert len(history.epochs) == 1
    once = runner_of()
    once.fit(batches(4), epochs=1)
    assert same_bits(runner.state_dict(), once.state_dict())


def test_stopped_by_another_thread() -> None:
    runner = runner_of()
    begun = threading.Event()

    def forever() -> Any:
        while True:
            yield from batches(8)

    def stop() -> None:
        begun.wait(60)
        runner.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    history = runner.fit(forever(), on_batch=lambda _: begun.set())
    thread.join()
    assert history.batch_losses


def test_stop_without_a_fit_does_nothing() -> None:
    runner = runner_of()
    runner.stop()
    assert len(runner.fit(batches(3)).epochs) == 1


@pytest.mark.parametrize(
    ("name", "meant"), [("on_epoch_ends", "on_epoch_end"), ("on_train_batch_end", "on_batch_end")]
)
def test_a_moment_that_there_is_not_is_refused(name: str, meant: str) -> None:
    for method in (lambda self, result: None, staticmethod(print), classmethod(print)):
        with pytest.raises(TypeError, match=rf"Mine\.{name} .* Did you mean '{meant}'\?"):
            type("Mine", (Callback,), {name: method})


def test_other_attributes_of_a_callback_are_its_own() -> None:
    kind = type("Mine", (Diary,), {"on_top": 3, "once": lambda self: None, "_on_it": print})
    diary = kind()
    runner_of().fit(batches(2), callbacks=[diary])
    assert diary.lines[-1] == "1 epochs"


@pytest.mark.parametrize(
    ("given", "words"),
    [(Diary(), "an instance of Diary"), (Diary, "the class Diary"), (None, "None")],
)
def test_callbacks_that_are_no_list(given: Any, words: str) -> None:
    with pytest.raises(
        TypeError, match=rf"must be a list .* got {words}\. .* callbacks=\[\.\.\.\]"
    ):
        runner_of().fit(batches(2), callbacks=given)
