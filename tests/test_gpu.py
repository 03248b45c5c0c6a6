"""On a CUDA device: ``FDG_REQUIRE_GPU=1 pytest -m gpu``."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from chains import (
    Batch,
    batches,
    compare,
    convolutional,
    even_split,
    images,
    largest_difference,
    mlp,
    same_bits,
)
from hopping import hopping
from nests import KINDS, nested
from overflows import SPLIT, overflowing, single
from plain import plain_evaluation, plain_outputs
from torch import Tensor, nn

from fdg_cuda import FDGRunner, _core
from fdg_cuda.errors import CaptureError
from fdg_cuda.flat import FlatMemory
from fdg_cuda.loss_scale import LossScale
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.gpu

# Sums in another order than on the CPU, over a few hundred updates.
FLOAT64 = 1e-9
FLOAT32 = 2e-3  # float32 rounds 5e8 times as coarsely
# Half precision: other orders of sums round activations to other neighbours, 2**-9 and 2**-12 apart.
BFLOAT16 = 2e-1
FLOAT16 = 5e-2


@pytest.fixture(autouse=True)
def nothing_left_of_earlier_tests() -> None:
    """Memory of runners that await the garbage collector, and cuBLAS's workspaces."""
    give_memory_back()


def give_memory_back() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def stage_every_hop(runner: FDGRunner) -> None:
    runner._machine.stage_every_hop = True  # type: ignore[attr-defined]


def sleeping(seed: int, longest_us: int) -> Any:
    def prepare(runner: FDGRunner) -> None:
        runner._machine.injected_delays = (seed, longest_us)  # type: ignore[attr-defined]

    return prepare


def as_float32(data: list[Batch]) -> list[Batch]:
    return [(x.float(), y) for x, y in data]


def test_the_extension_has_its_cuda_part() -> None:
    assert "cuda" in _core.backends
    assert torch.cuda.is_available()


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backward_weights", ["stash", "current", "replay"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_agrees_with_the_oracle(
    stages: int, method: str, backward_weights: str, graphs: bool
) -> None:
    """BatchNorm, three epochs, a partial last batch. ``"replay"`` leaves stages without delay to be
    captured."""
    replays = backward_weights == "replay" and method != "bp" and stages > 1
    difference = compare(
        mlp(),
        even_split(8, stages),
        batches(14),
        device=0,
        runner_options={"graphs": "auto" if graphs and replays else graphs},
        epochs=3,
        method=method,
        backward_weights=backward_weights,
        lr=0.05,
    )
    assert difference < FLOAT64


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_agrees_with_the_oracle_in_float32(stages: int, graphs: bool) -> None:
    difference = compare(
        mlp().float(),
        even_split(8, stages),
        as_float32(batches(14)),
        device=0,
        runner_options={"graphs": graphs},
        epochs=2,
        lr=0.02,
    )
    assert difference < FLOAT32


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_sleeps_of_the_device_change_no_number(stages: int, staged: bool, graphs: bool) -> None:
    """Before every action, on every stream: a missing wait would show."""
    for seed in range(3):

        def prepare(runner: FDGRunner, seed: int = seed) -> None:
            if staged:
                stage_every_hop(runner)
            sleeping(seed, 400)(runner)

        difference = compare(
            mlp(),
            even_split(8, stages),
            batches(20),
            device=0,
            prepare=prepare,
            runner_options={"graphs": graphs},
            lr=0.05,
        )
        assert difference < FLOAT64


def test_the_same_seed_gives_the_same_bits() -> None:
    model, data = mlp(), batches(14)
    results = []
    for seed in (0, 0, 1, 2):
        runner = FDGRunner(copy.deepcopy(model), [0, 0, 0], split=[2, 5], lr=0.05)
        sleeping(seed, 300 * (seed > 0))(runner)
        runner.fit(data, epochs=2)
        results.append(runner.state_dict())
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_convolutional_net_in_channels_last() -> None:
    model, data = convolutional(), images(9)
    for graphs in (False, True):
        assert (
            compare(
                copy.deepcopy(model),
                [2, 3],
                data,
                device=0,
                runner_options={"graphs": graphs},
                epochs=2,
                lr=0.05,
            )
            < FLOAT64
        )


def with_dropout() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 64), nn.Dropout(0.5),
        nn.Linear(64, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_dropout_repeats_with_the_seed_and_differs_from_batch_to_batch(graphs: bool) -> None:
    model = with_dropout()
    one = batches(1, last=None)[0]
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runner = FDGRunner(
            copy.deepcopy(model), [0, 0], split=[3], lr=0.0, weight_decay=0.0, graphs=graphs
        )
        # The same batch again and again, and no update: losses differ by their masks only.
        runs.append(runner.fit([one] * 24).batch_losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 24


def test_graphs_draw_the_random_numbers_of_the_eager_run() -> None:
    """Neither warm-up nor capture takes any; the first batch gets the numbers it would get."""
    model = with_dropout()
    first = []
    for graphs in (False, True):
        torch.manual_seed(11)
        runner = FDGRunner(copy.deepcopy(model), [0, 0], split=[3], lr=0.0, graphs=graphs)
        first.append(runner.fit(batches(1, last=None)).batch_losses[0])
    assert first[0] == pytest.approx(first[1], rel=1e-12)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("step", ["epoch", "batch"])
def test_a_schedule_of_learning_rates(graphs: bool, step: str) -> None:
    model, data = mlp(), batches(9)
    results = []
    for devices, options in ((["cpu"] * 3, {}), ([0] * 3, {"graphs": graphs})):
        twin = copy.deepcopy(model)
        runner = FDGRunner(twin, devices, split=[2, 5], lr=0.05, **options)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(runner.optimizer, [1, 2, 5], gamma=0.5)
        runner.fit(data, epochs=3, lr_scheduler=scheduler, lr_step=step)
        results.append(runner.state_dict())
    assert largest_difference(*results) < FLOAT64


class Asking(nn.Module):
    """Waits for the device in its forward, which no capture permits."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if float(x.sum()) > 1e9 else 1.0)


def test_a_stage_that_cannot_be_captured_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), Asking(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)
    ).double()
    assert compare(model, [2, 4], batches(14), device=0, epochs=2, lr=0.05) < FLOAT64
    assert "stage 1 runs eagerly" in caplog.text
    assert "test_gpu.py" in caplog.text
    runner = FDGRunner(copy.deepcopy(model).cpu(), [0] * 3, split=[2, 4], graphs=True)
    with pytest.raises(CaptureError, match="stage 1"):
        runner.fit(batches(4))


def test_random_numbers_still_come_after_a_capture_that_failed() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(), Asking(), nn.Linear(12, 4)).double()
    runner = FDGRunner(model, [0, 0], split=[3], lr=0.0, weight_decay=0.0)
    losses = runner.fit(batches(1, last=None) * 12).batch_losses
    assert len(set(losses)) == 12
    assert torch.rand(3, device="cuda").isfinite().all()


def test_a_capture_that_fails_leaves_earlier_random_stages_alone() -> None:
    """Stage 0 draws random numbers in its graphs, then the capture of stage 1 fails."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(6, 64), nn.Dropout(), nn.Tanh(), Asking(), nn.Linear(64, 4)
    ).double()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runner = FDGRunner(copy.deepcopy(model), [0, 0], split=[3], lr=0.0, weight_decay=0.0)
        runs.append(runner.fit(batches(1, last=None) * 16, epochs=2).batch_losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 32


def test_batches_of_other_sizes_in_between() -> None:
    data = [
        batches(1, size=n, last=None, seed=i)[0] for i, n in enumerate((8, 3, 8, 8, 9, 8, 2, 8))
    ]
    assert compare(mlp(), [2, 5], data, device=0, epochs=3, lr=0.05) < FLOAT64


def test_the_host_waits_for_nothing_while_ticks_run() -> None:
    runner = FDGRunner(mlp(), [0, 0], split=[4], lr=0.05, graphs=True)

    def watch(result: Any) -> None:
        if result.batch == 20:
            torch.cuda.set_sync_debug_mode("error")
        if result.batch == 60:
            torch.cuda.set_sync_debug_mode("default")

    try:
        runner.fit(batches(100, last=None), on_batch=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("stages", [1, 3])
def test_bfloat16_agrees_with_the_cpu(stages: int, backward_weights: str, graphs: bool) -> None:
    results = []
    for device in ("cpu", 0):
        runner = FDGRunner(
            mlp().float(),
            [device] * stages,
            split=even_split(8, stages),
            lr=0.02,
            precision="bfloat16",
            backward_weights=backward_weights,
            graphs=graphs if device == 0 else "auto",
        )
        runner.fit(as_float32(batches(14)), epochs=2)
        results.append(runner.state_dict())
    assert largest_difference(*results) < BFLOAT16


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_float16_leaves_out_what_the_cpu_does(method: str, options: dict[str, Any]) -> None:
    results = []
    for device in ("cpu", 0):
        runner = FDGRunner(
            overflowing((0, 2, 12)),
            [device] * 3,
            split=SPLIT,
            lr=0.02,
            method=method,
            precision="float16",
            **options,
        )
        runner._loss_scale = LossScale(2.0**10)  # small enough that nothing else overflows
        history = runner.fit(as_float32(batches(16)), epochs=2)
        shown = [(epoch.skipped, epoch.loss_scale) for epoch in history.epochs]
        results.append((shown, runner.state_dict()))
    (shown_cpu, weights_cpu), (shown_cuda, weights_cuda) = results
    assert shown_cpu == shown_cuda
    assert shown_cuda[0][0] is not None
    assert shown_cuda[0][0][0] > 0
    assert largest_difference(weights_cuda, weights_cpu) < FLOAT16


def test_the_host_waits_for_nothing_in_float16() -> None:
    runner = FDGRunner(
        overflowing(range(25, 40)), [0, 0, 0], split=SPLIT, precision="float16", clip_norm=1.0
    )

    def watch(result: Any) -> None:
        if result.batch == 20:
            torch.cuda.set_sync_debug_mode("error")
        if result.batch == 60:
            torch.cuda.set_sync_debug_mode("default")

    try:
        runner.fit(single(100, last=None), on_batch=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_memory_stays_flat_over_2000_ticks(graphs: bool) -> None:
    taken = {}

    def note(result: Any) -> None:
        if result.batch in (200, 1990):
            taken[result.batch] = torch.cuda.memory_allocated()

    runner = FDGRunner(mlp(), [0, 0, 0], split=[2, 5], lr=0.01, graphs=graphs)
    runner.fit(batches(10, last=None) * 200, on_batch=note)
    assert taken[200] == taken[1990]


def test_a_fit_gives_its_memory_back() -> None:
    data = batches(12)
    FDGRunner(mlp(), [0, 0, 0], split=[2, 5]).fit(data)
    give_memory_back()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        FDGRunner(mlp(), [0, 0, 0], split=[2, 5]).fit(data)
    give_memory_back()
    assert torch.cuda.memory_allocated() <= before


def test_evaluate_predict_and_state() -> None:
    runner = FDGRunner(mlp(), [0, 0], split=[4], lr=0.05)
    data = batches(9)
    history = runner.fit(data)
    x = data[0][0]
    plain = mlp()
    plain.load_state_dict(runner.state_dict())
    with torch.no_grad():
        expected = plain.eval()(x)
    assert torch.allclose(runner.predict(x), expected, rtol=FLOAT64)
    assert runner.predict(x).device == x.device
    assert runner.predict(x.cuda()).is_cuda
    assert runner.evaluate(data).samples == history.epochs[0].samples
    assert all(not value.is_cuda for value in runner.state_dict().values())


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_inputs_train_and_are_evaluated(kind: str, stages: int) -> None:
    model, data, loss = nested(kind, batches(9))
    split = even_split(9, stages)
    options: dict[str, Any] = {"split": split, "loss_fn": loss, "lr": 0.05}
    twin = copy.deepcopy(model)
    FDGRunner(twin, ["cpu"] * stages, **options).fit(data, epochs=2)
    runner = FDGRunner(model, [0] * stages, graphs=True, **options)
    runner.fit(data, epochs=2, on_epoch=lambda _: runner.evaluate(data))
    assert largest_difference(runner.state_dict(), twin.state_dict()) < FLOAT64
    found, expected = runner.evaluate(data), plain_evaluation(twin, data, loss)
    assert found.loss == pytest.approx(expected.loss, rel=FLOAT64)
    assert (found.accuracy, found.samples) == (expected.accuracy, expected.samples)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_several_tensors_between_two_stages(graphs: bool) -> None:
    """The agreement with the CPU; integers, and a tensor that is handed through every stage."""
    found = []
    for device, options in ((0, {"graphs": graphs}), ("cpu", {})):
        runner = FDGRunner(hopping(), [device] * 3, split=[2, 3], lr=0.05, **options)
        losses = runner.fit(batches(9), epochs=2).batch_losses
        found.append((losses, runner.state_dict(), runner.evaluate(batches(9)).loss))
    assert found[0][0] == pytest.approx(found[1][0], rel=FLOAT64)
    assert largest_difference(found[0][1], found[1][1]) < FLOAT64
    assert found[0][2] == pytest.approx(found[1][2], rel=FLOAT64)


def test_predictions_of_many_batches_are_where_their_inputs_are() -> None:
    """More batches than are on their way, of the host's memory and of the device's."""
    model, data = mlp(), batches(40)
    expected = plain_outputs(model, data)
    runner = FDGRunner(model, [0, 0, 0], split=[3, 6])
    for inputs in ([x for x, _ in data], [x.cuda() for x, _ in data]):
        for x, output, right in zip(inputs, runner.predict_batches(inputs), expected, strict=True):
            assert output.device == x.device
            assert torch.allclose(output.cpu(), right, rtol=FLOAT64)


def test_the_cut_is_measured_on_the_device() -> None:
    runner = FDGRunner(mlp(), [0, 0], lr=0.05)
    runner.fit(batches(6))
    assert runner.split is not None


def test_lack_of_memory_says_which_stage() -> None:
    try:
        total = torch.cuda.get_device_properties(0).total_memory
        room = (torch.cuda.memory_reserved() + 2**28) / total
        torch.cuda.set_per_process_memory_fraction(room)
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2**26), nn.Linear(2**26, 4))
        runner = None
        with pytest.raises(torch.OutOfMemoryError, match=r"stage 1 does not fit on CUDA device 0"):
            runner = FDGRunner(model, [0, 0], split=[1])
        assert runner is None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_timeline_of_the_device(tmp_path: Any) -> None:
    runner = FDGRunner(mlp(), [0, 0, 0], split=[2, 5], lr=0.05)
    with runner.trace(tmp_path / "trace.json", ticks=10) as timeline:
        runner.fit(batches(40, last=None))
    assert timeline.ticks == 10
    assert all(0 < stage.busy < 1.001 for stage in timeline.stages)
    for stream in range(len(timeline.lanes)):
        spans = sorted(
            (s for s in timeline.spans if s.stream == stream), key=lambda s: (s.tick, s.begin)
        )
        for earlier, later in pairwise(spans):
            assert earlier.end <= later.begin + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["plain", "momentum", "nesterov"])
def test_the_kernel_gives_the_bits_of_the_cpu(rule: str, dtype: torch.dtype) -> None:
    """Sizes around chunks and vectors, a missing gradient, one at an odd address."""
    sizes = [1, 3, 16, 17, 1000, 4095, 4096, 4097, 12289, 5, 0, 100_003]
    generator = torch.Generator().manual_seed(0)

    def random(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    parameters = [nn.Parameter(random(n)) for n in sizes]
    gradients = [None if i == 4 else random(n) for i, n in enumerate(sizes)]
    hyper = np.zeros((1, 5))
    hyper[0] = (0.1, 0.0 if rule == "plain" else 0.9, 1e-2, rule == "nesterov", 0.25)
    results = []
    for device in ("cpu", "cuda"):
        memory = FlatMemory(parameters, 2, 0, torch.device(device))
        for update in range(3):
            table = []
            for gradient in gradients:
                # One element further than the allocation: aligned to the element only.
                room = torch.empty(0 if gradient is None else gradient.numel() + 1, dtype=dtype)
                placed = room.to(device)[1:]
                if gradient is not None:
                    placed.copy_(gradient)
                table.append(None if gradient is None else placed)
            source, target = update % 2, (update + 1) % 2
            memory.gradient_table[0] = [0 if g is None else g.data_ptr() for g in table]
            if device == "cpu":
                memory.cpu_sgd(hyper, 1).run_update(source, target, 0)
            else:
                run_on_cuda(memory, hyper, source, target)
        results.append((memory.weights[1].cpu(), memory.momentum.cpu()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_takes_gradients_of_half_precision(half: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.randn(n)) for n in (7, 4096, 10_001)]
    gradients = [torch.randn_like(p).to(half).cuda() for p in parameters]
    hyper = np.array([[0.1, 0.9, 1e-2, 0.0, 0.5]])
    one = FlatMemory(parameters, 2, 0, torch.device("cuda"))
    one.gradient_table[0] = [g.data_ptr() for g in gradients]
    run_on_cuda(one, hyper, 0, 1, str(half).removeprefix("torch."))
    other = FlatMemory(parameters, 2, 0, torch.device("cuda"))
    full = [g.float() for g in gradients]
    other.gradient_table[0] = [g.data_ptr() for g in full]
    run_on_cuda(other, hyper, 0, 1)
    assert torch.equal(one.weights[1], other.weights[1])


def run_on_cuda(
    memory: FlatMemory, hyper: np.ndarray, source: int, target: int, gradient_dtype: str = ""
) -> None:
    addresses = memory.addresses(hyper)
    sgd = _core.CudaSgd(
        **addresses,
        gradient_dtype=gradient_dtype or addresses["dtype"],
        device=0,
        slots=1,
        ticks_in_flight=1,
    )
    torch.cuda.synchronize()
    scheduler = _core.Scheduler("cuda", ["update"], devices=[0])
    action = scheduler.add_action(
        code="U",
        stage=0,
        slot=0,
        stream=0,
        reads=[],
        writes=[],
        work=sgd.update(source, target, 0),
    )
    scheduler.submit(scheduler.add_tick([(action, 0)]), 0)
    scheduler.synchronize()
    scheduler.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one card")
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("staged", [False, True], ids=["peers", "staged"])
def test_two_cards(graphs: bool, staged: bool) -> None:
    model, data = mlp(), batches(14)
    results = []
    for devices in (["cpu"] * 3, [0, 1, 0]):
        options = {} if devices[0] == "cpu" else {"graphs": graphs}
        runner = FDGRunner(copy.deepcopy(model), devices, split=[2, 5], lr=0.05, **options)
        if devices[0] != "cpu":
            runner._machine.stage_every_hop = staged  # type: ignore[attr-defined]
        runner.fit(data, epochs=2)
        results.append(runner.state_dict())
    assert largest_difference(*results) < FLOAT64


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from chains import batches, mlp\n"
        "from fdg_cuda import FDGRunner\n"
        "FDGRunner(mlp(), [0, 0, 0], split=[2, 5], lr=0.05).fit(batches(9))\n"
    )
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
    try:
        done = subprocess.run(
            [*command, sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer --tool={tool} takes too long here")
    if "not supported" in done.stdout + done.stderr:
        pytest.skip(f"compute-sanitizer does not work here: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout[-4000:]
