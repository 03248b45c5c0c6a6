"""What is replayed as a graph, what is not, and that neither shows in the numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chains import Batch, batches, compare, convolutional, even_split, images, mlp, same_bits
from torch import Tensor, nn

from fdg_cuda import FDGRunner
from fdg_cuda.accelerator import accelerator
from fdg_cuda.cuda_graphs import StageGraphs
from fdg_cuda.errors import CaptureError

TOLERANCE = 1e-10


def of_sizes(*sizes: int) -> list[Batch]:
    return [batches(1, size=n, last=None, seed=i)[0] for i, n in enumerate(sizes)]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    "sizes",
    [(8, 3, 8, 8, 2, 8, 8, 8, 9, 8), (8, 8, 8, 8, 8, 8, 8, 3, 3, 3), (3, 8, 8, 8, 8, 3, 3)],
    ids=["sprinkled", "last ones", "first one"],
)
def test_batches_of_other_sizes_are_run_eagerly_in_between(
    stages: int, sizes: tuple[int, ...], stand_in: Any
) -> None:
    difference = compare(
        mlp(), even_split(8, stages), of_sizes(*sizes), device=0, epochs=3, lr=0.05
    )
    assert difference < TOLERANCE
    regular = sum(size == sizes[0] for size in sizes)
    assert stand_in.calls_of["cudaGraphLaunch"] == 3 * 2 * stages * regular


class Growing(nn.Module):
    """Its output has another length for some inputs of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, : int(x[0, 0] > 0)]], dim=1)


class Folding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :12]


def test_a_stage_whose_output_changes_its_shape_makes_those_above_eager() -> None:
    model = nn.Sequential(
        nn.Linear(6, 12), Growing(), Folding(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)
    ).double()
    accelerator().refuses = lambda capture: RuntimeError("host synchronisation")
    assert compare(model, [2, 4], batches(12, last=None), device=0, lr=0.05) < TOLERANCE
    accelerator().captures = 0
    accelerator().refuses = lambda capture: (
        RuntimeError("host synchronisation") if capture == 1 else None
    )
    assert compare(model, [2, 4], batches(12, last=None), device=0, lr=0.05) < TOLERANCE


@pytest.mark.parametrize("capture", range(1, 9))
def test_a_capture_that_fails_leaves_the_stage_eager_and_the_numbers_right(
    capture: int, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int) -> Exception | None:
        return RuntimeError("operation not permitted\nmore") if number == capture else None

    accelerator().refuses = refuse
    assert compare(mlp(), [3, 5], batches(9), device=0, epochs=2, lr=0.05) < TOLERANCE
    assert "runs eagerly, which is slower" in caplog.text
    assert "cannot be captured: operation not permitted" in caplog.text


def test_a_stage_that_cannot_be_captured_says_where(caplog: pytest.LogCaptureFixture) -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if accelerator().captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            return x

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Asking(), nn.Linear(5, 4)).double()
    accelerator().captures = 0
    runner = FDGRunner(model, [0, 0], split=[2])
    with pytest.raises(RuntimeError, match="not permitted"):
        runner.fit(batches(6))  # eagerly too, here


def test_graphs_true_means_all_or_an_error() -> None:
    accelerator().refuses = lambda capture: RuntimeError("no")
    runner = FDGRunner(mlp(), [0, 0], split=[4], graphs=True)
    with pytest.raises(CaptureError, match=r"stage 0 cannot run as captured graphs.*graphs='auto'"):
        runner.fit(batches(4))


def test_graphs_false_captures_nothing() -> None:
    FDGRunner(mlp(), [0, 0], split=[4], graphs=False).fit(batches(4))
    assert accelerator().captures == 0


def test_hooks_are_called_for_every_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    FDGRunner(model, [0, 0], split=[4], lr=0.05).fit(batches(7))
    assert len(seen) == 7
    assert "stage 0 runs eagerly" in caplog.text
    assert "hooks" in caplog.text
    assert "stage 1" not in caplog.text


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand_like(x) < 0.5
        self.drawn.append(mask)
        return x * mask


def with_noise() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), Noise(), nn.Linear(5, 5), nn.Dropout(0.3), nn.Linear(5, 4)
    ).double()


def test_random_numbers_differ_from_batch_to_batch_and_repeat_with_the_seed(stand_in: Any) -> None:
    model = with_noise()
    results = []
    for _ in range(2):
        twin = copy.deepcopy(model)
        torch.manual_seed(7)
        runner = FDGRunner(twin, [0, 0], split=[3], lr=0.05)
        runner.fit(batches(9, last=None), epochs=2)
        results.append(runner.state_dict())
        masks = twin[2].drawn
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) >= 18
    assert same_bits(*results)
    # Only torch's own replay draws new numbers.
    assert stand_in.calls_of.get("cudaGraphLaunch", 0) == 0


def test_warming_up_draws_no_random_numbers_from_the_run() -> None:
    """The first batch gets the numbers it would get without graphs."""
    model = with_noise()
    first = []
    for graphs in (False, True):
        twin = copy.deepcopy(model)
        torch.manual_seed(7)
        runner = FDGRunner(twin, [0, 0], split=[3], lr=0.0, graphs=graphs)
        first.append(runner.fit(batches(1, last=None)).batch_losses[0])
    assert first[0] == first[1]


def test_modes_changed_between_epochs_are_captured_again() -> None:
    """A layer frozen in evaluation mode in on_epoch must not go on in training mode."""
    model, states = mlp(), []
    norm = next(m for m in model if isinstance(m, nn.BatchNorm1d))

    for graphs in (False, True):
        twin = copy.deepcopy(model)
        twin_norm = next(m for m in twin if isinstance(m, nn.BatchNorm1d))
        runner = FDGRunner(twin, [0, 0], split=[4], lr=0.05, graphs=graphs)
        runner.fit(batches(5), epochs=3, on_epoch=lambda epoch, norm=twin_norm: norm.eval())
        states.append(runner.state_dict())
        assert not torch.equal(twin_norm.running_mean, norm.running_mean)
    assert same_bits(*states)


def test_a_stage_with_nothing_to_train_passes_signals_on() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Tanh(), nn.Linear(5, 4))
    model = model.double()
    for split in ([2, 4], [1, 2], [2, 3]):
        assert compare(copy.deepcopy(model), split, batches(7), device=0, lr=0.05) < TOLERANCE


def test_integer_inputs_and_frozen_layers() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 4))
    model = model.double()
    data = [(torch.randint(0, 9, (8, 4)), torch.randint(0, 4, (8,))) for _ in range(7)]
    assert compare(copy.deepcopy(model), [1, 2], data, device=0, lr=0.05) < TOLERANCE
    model[0].requires_grad_(False)
    assert compare(copy.deepcopy(model), [1, 2], data, device=0, lr=0.05) < TOLERANCE
    model[2].requires_grad_(False)
    assert compare(copy.deepcopy(model), [1, 3], data, device=0, lr=0.05) < TOLERANCE


def test_layouts_survive_the_hops() -> None:
    model, data = convolutional(), images(7)
    for split in ([2, 3], [1, 4], [2, 4]):
        assert compare(copy.deepcopy(model), split, data, device=0, epochs=2, lr=0.05) < TOLERANCE


def test_no_forward_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward frees while it is captured must not hold what another graph leaves behind;
    backwards of one stage may share, since nothing they leave outlives the next one's begin."""
    captured: list[tuple[str, int]] = []
    plain = StageGraphs._captured

    def watched(self: StageGraphs, what: str, pool: object, function: Any) -> Any:
        captured.append((f"{what} {self._stage.index}", id(pool)))
        pools.append(pool)
        return plain(self, what, pool, function)

    pools: list[object] = []  # alive, so that no two have one id
    monkeypatch.setattr(StageGraphs, "_captured", watched)
    FDGRunner(mlp(), [0, 0, 0], split=even_split(8, 3), lr=0.05).fit(batches(12, last=None))
    forwards = [pool for what, pool in captured if what.startswith("forward")]
    backwards = {(what, pool) for what, pool in captured if what.startswith("backward")}
    assert len(forwards) == len(set(forwards)) == 4 + 2 + 1
    assert len(backwards) == len({pool for _, pool in backwards}) == 3
    assert not set(forwards) & {pool for _, pool in backwards}
