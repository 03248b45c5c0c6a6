"""What a runner says to input it cannot train, and odd input that it must train rightly.

A refusal names the value and the remedy and leaves the model as it was; no thread is left running
(fixture ``no_thread_left``). What is allowed must agree with the oracle.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CLASSES, FEATURES, batches, largest_difference, oracle, same_bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fdg_cuda import AliasedParameterError, FDGRunner
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")

TOLERANCE = 1e-10  # float64, relative
WIDTH = 5
SPLITS = [pytest.param([2], id="given-split"), pytest.param(None, id="measured-split")]

Data = list[tuple[Tensor, Tensor]]


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


def chain(*, inner: list[nn.Module] | None = None) -> nn.Sequential:
    """Linear, Tanh, ``inner`` (default Linear, Tanh), Linear in float64."""
    torch.manual_seed(3)
    middle = [nn.Linear(WIDTH, WIDTH), nn.Tanh()] if inner is None else inner
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.Tanh(), *middle, nn.Linear(WIDTH, CLASSES)
    ).double()


def runner_of(model: Any, stages: int = 2, **options: Any) -> FDGRunner:
    return FDGRunner(model, ["cpu"] * stages, **options)


@contextmanager
def refused(
    error: type[Exception] | tuple[type[Exception], ...],
    *words: str,
    model: nn.Module | None = None,
) -> Iterator[None]:
    """The body raises ``error``, its message holds all ``words``, and ``model`` is untouched."""
    before = copy.deepcopy(model.state_dict()) if model is not None else {}
    parameters = list(model.parameters()) if model is not None else []
    wanted = [p.requires_grad for p in parameters]
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    if model is not None:
        assert same_bits(model.state_dict(), before)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [p.requires_grad for p in parameters] == wanted


def agrees_with_oracle(
    model: nn.Sequential, split: list[int], data: Data | None = None, **options: Any
) -> None:
    """Trains ``model`` and compares weights, buffers and losses."""
    data = batches(6) if data is None else data
    settings = {"lr": 0.1, **options}
    untrained = copy.deepcopy(model.state_dict())
    expected, recorded = oracle(model, split, data, **settings)
    history = runner_of(model, len(split) + 1, split=split, **settings).fit(data)
    assert largest_difference(model.state_dict(), expected) < TOLERANCE
    assert history.batch_losses == pytest.approx(recorded.losses, rel=TOLERANCE)
    assert not same_bits(model.state_dict(), untrained)


# -- the cut ----------------------------------------------------------------------------------------


def test_fewer_layers_than_stages() -> None:
    with refused(ValueError, "3 layers", "4 stages", "at most 3 devices"):
        runner_of(chain(inner=[]), 4)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ([3, 2], ["increase", "[3, 2]"]),
        ([2, 2], ["increase", "[2, 2]"]),
        ([2], ["2 layers", "[2]"]),
        ([], ["2 layers", "[]"]),
        ([1, 2, 3], ["2 layers", "[1, 2, 3]"]),
        ([0, 2], ["between 1 and 4", "[0, 2]"]),
        ([2, 5], ["between 1 and 4", "[2, 5]"]),
        ([-1, 2], ["between 1 and 4", "[-1, 2]"]),
    ],
)
def test_split_indices_that_cannot_cut(split: list[int], words: list[str]) -> None:
    model = chain()
    with refused(ValueError, "split", *words, model=model):
        runner_of(model, 3, split=split)


@pytest.mark.parametrize("split", [2, [1.5], ["a"]], ids=repr)
def test_split_of_another_type(split: Any) -> None:
    with refused((TypeError, ValueError), "split"):
        runner_of(chain(), split=split)


@pytest.mark.parametrize("model", [None, 5, nn.Linear(3, 4), [nn.Tanh(), torch.tanh], "net"])
def test_model_of_another_type(model: Any) -> None:
    with refused(TypeError, "nn."):
        runner_of(model, 1)


@pytest.mark.parametrize("model", [[], nn.Sequential()], ids=["list", "Sequential"])
def test_model_without_layers(model: Any) -> None:
    with refused(ValueError, "no layers"):
        runner_of(model, 1)


def test_sequential_with_a_forward_of_its_own() -> None:
    """Its children are not the chain: stages would train another function than evaluate measures."""

    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(100 * x)

    with refused(TypeError, "forward"):
        runner_of(Scaled(*chain()), split=[2])


# -- devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["tpu", "", "meta", "cpux", -1], ids=repr)
def test_unknown_device(device: Any) -> None:
    with refused(ValueError, repr(device), "'cpu'"):
        FDGRunner(chain(), ["cpu", device])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("device", [0, 1, "cuda", "cuda:0", torch.device("cuda", 0)], ids=repr)
def test_cuda_device_where_there_is_none(device: Any) -> None:
    with refused(ValueError, repr(device), "there is none here", "'cpu'"):
        FDGRunner(chain(), [device, device])


def test_cuda_ordinal_beyond_the_last() -> None:
    with refused(ValueError, "99"):
        FDGRunner(chain(), [99, 99])


@pytest.mark.parametrize(
    "devices", ["cpu", 0, None, {"cpu"}, ["cpu", None], [True, True]], ids=repr
)
def test_devices_of_another_type(devices: Any) -> None:
    with refused(TypeError, "device"):
        FDGRunner(chain(), devices)


def test_no_devices() -> None:
    with refused(ValueError, "empty", "['cpu', 'cpu']"):
        FDGRunner(chain(), [])


# -- hyper-parameters and choices -------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 0.0, -0.5, 1.0001, math.nan, math.inf], ids=repr)
def test_beta_out_of_range(beta: float) -> None:
    with refused(ValueError, "beta", "above 0 and at most 1", repr(beta)):
        runner_of(chain(), beta=beta)


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.0001, math.nan], ids=repr)
def test_beta_set_out_of_range_before_fit(beta: float) -> None:
    model = chain()
    runner = runner_of(model, split=[2])
    runner.optimizer.param_groups[0]["beta"] = beta
    with refused(ValueError, "beta", "above 0 and at most 1", repr(beta), model=model):
        runner.fit(batches(3))
    runner.optimizer.param_groups[0]["beta"] = 1.0
    runner.fit(batches(3))


def test_beta_set_out_of_range_while_training() -> None:
    runner = runner_of(chain(), split=[2])

    def spoil(_: object) -> None:
        runner.optimizer.param_groups[0]["beta"] = 2.0

    with refused(ValueError, "beta", "2.0"):
        runner.fit(batches(9), on_batch=spoil)
    runner.optimizer.param_groups[0]["beta"] = 0.5
    runner.fit(batches(3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("lr", "momentum", "weight_decay")
        for value in (-0.1, math.nan, math.inf)
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["given", "set-later"])
def test_other_hyper_parameters_out_of_range(name: str, value: float, later: bool) -> None:
    """Set later too: one batch with lr = NaN makes every weight NaN, and no loss shows it."""
    model = chain()
    with refused(ValueError, name, repr(value), model=model):
        runner = runner_of(model, split=[2], **({} if later else {name: value}))
        runner.optimizer.param_groups[0][name] = value
        runner.fit(batches(1, last=None))


@pytest.mark.parametrize("name", ["lr", "beta"])
@pytest.mark.parametrize("value", ["0.5", None], ids=repr)
def test_hyper_parameters_of_another_type(name: str, value: Any) -> None:
    with refused((TypeError, ValueError), name, repr(value)):
        runner_of(chain(), **{name: value})


def test_nesterov_without_momentum() -> None:
    with refused(ValueError, "nesterov", "momentum"):
        runner_of(chain(), nesterov=True, momentum=0.0)


def test_second_parameter_group() -> None:
    runner = runner_of(chain(), split=[2])
    with refused(ValueError, "one parameter group"):
        runner.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})


@pytest.mark.parametrize("option", ["method", "backward_weights"])
def test_unknown_choice(option: str) -> None:
    known = {"method": METHODS, "backward_weights": ("stash", "current")}[option]
    with refused(ValueError, option, "'gpipe'", *known):
        runner_of(chain(), **{option: "gpipe"})


def test_other_arguments_out_of_range() -> None:
    with refused(ValueError, "cpu_threads", "0"):
        runner_of(chain(), cpu_threads=0)
    runner = runner_of(chain(), split=[2])
    with refused(ValueError, "epochs", "-1"):
        runner.fit(batches(2), epochs=-1)
    with refused(ValueError, "lr_step", "'tick'"):
        runner.fit(batches(2), lr_step="tick")


# -- loaders ----------------------------------------------------------------------------------------

X, Y = torch.zeros(2, FEATURES, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
BAD_LOADERS: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "None": (None, TypeError, ["pairs (input, target)", "NoneType"]),
    "not iterable": (5, TypeError, ["pairs (input, target)", "int"]),
    "empty": ([], ValueError, ["no batch", "drop_last"]),
    "empty generator": ((b for b in ()), ValueError, ["no batch"]),
    "tensors": ([X, X], TypeError, ["batch 0", "pairs (input, target)", "Tensor"]),
    "triples": ([(X, Y, Y)], TypeError, ["batch 0", "pairs (input, target)", "tuple of 3"]),
    "dicts": ([{"x": X, "y": Y}], TypeError, ["batch 0", "pairs (input, target)", "dict"]),
    "arrays": ([(X.numpy(), Y)], TypeError, ["batch 0", "input", "ndarray", "torch.as_tensor"]),
    "lists": ([(X, [0, 0])], TypeError, ["batch 0", "target", "list", "torch.as_tensor"]),
    "lengths": ([(X, Y[:1])], ValueError, ["batch 0", "2 samples", "target 1"]),
    "no samples": ([(X[:0], Y[:0])], ValueError, ["batch 0", "input", "no samples"]),
    "scalar target": ([(X, Y[0])], ValueError, ["batch 0", "target", "no samples"]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", BAD_LOADERS)
def test_loader_that_gives_no_pairs(kind: str, split: list[int] | None) -> None:
    loader, error, words = BAD_LOADERS[kind]
    model = chain()
    runner = runner_of(model, split=split)
    with refused(error, *words, model=model):
        runner.fit(loader)
    with refused(error, *words, model=model):
        runner.evaluate(loader)
    runner.fit(batches(2))


@pytest.mark.parametrize("bad", [(X, Y[:1]), X, (X, None)], ids=["lengths", "no pair", "no target"])
def test_loader_that_goes_bad_in_the_middle(bad: Any) -> None:
    runner = runner_of(chain(), split=[2])
    with refused((TypeError, ValueError), "batch 3"):
        runner.fit([*batches(3), bad, *batches(3)])
    runner.fit(batches(2))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "once", [iter, lambda data: (b for b in data), lambda data: map(tuple, data)], ids=str
)
def test_one_shot_loader(once: Callable[[Data], Iterator[Any]], split: list[int] | None) -> None:
    """Refused for two epochs before anything is trained; for one epoch no batch is lost."""
    data = batches(4)
    model = chain()
    runner = runner_of(model, split=split)
    with refused(TypeError, "one-shot", "2 epochs", "DataLoader", model=model):
        runner.fit(once(data), epochs=2)
    losses = runner.fit(once(data)).batch_losses
    assert len(losses) == 4
    twin = chain()
    assert losses == runner_of(twin, split=runner.split).fit(data).batch_losses
    assert same_bits(model.state_dict(), twin.state_dict())


def test_loader_that_is_used_up_after_an_epoch() -> None:
    """It pretends to be iterable again. The first epoch's work is kept."""

    class Once:
        def __init__(self) -> None:
            self.left = batches(4)

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop(0)

    model, twin = chain(), chain()
    with refused(ValueError, "no batch"):
        runner_of(model, split=[2]).fit(Once(), epochs=3)
    runner_of(twin, split=[2]).fit(batches(4))
    assert same_bits(model.state_dict(), twin.state_dict())


def test_predict_takes_tensors_only() -> None:
    with refused(TypeError, "tensor", "list"):
        runner_of(chain()).predict([[0.0] * FEATURES])  # type: ignore[arg-type]


# -- stages without parameters, frozen and shared parameters ------------------------------------------


@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [[2, 5], [3, 5], [4, 6]], ids=["first", "middle", "last"])
def test_stage_without_parameters(split: list[int], method: str, backward_weights: str) -> None:
    linear = [nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)]
    model = {
        2: [nn.Hardtanh(), nn.Tanh(), linear[0], nn.Tanh(), nn.Tanh(), linear[1]],
        3: [linear[0], nn.Tanh(), nn.Tanh(), nn.Hardtanh(), nn.Tanh(), linear[1]],
        4: [linear[0], nn.Tanh(), nn.Tanh(), linear[1], nn.Tanh(), nn.Tanh(), nn.Hardtanh()],
    }[split[0]]
    agrees_with_oracle(
        nn.Sequential(*model).double(), split, method=method, backward_weights=backward_weights
    )


@pytest.mark.parametrize("when", ["given", "measured", "buffer"])
def test_tensor_shared_by_two_stages(when: str) -> None:
    if when == "buffer":
        norm = nn.BatchNorm1d(WIDTH, affine=False)
        model = chain(inner=[norm, nn.Tanh(), norm])
    else:
        model = chain(inner=[nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
        model[4].weight = model[2].weight
    words = ["shared by stages", "split", "of its own"]
    if when == "measured":
        runner = runner_of(model, len(model))
        with refused(ValueError, *words, model=model):
            runner.fit(batches(2))
    else:
        with refused(ValueError, *words, "stages 0 and 1", model=model):
            runner_of(model, split=[4])
    assert len(runner_of(model, split=[1]).fit(batches(2)).batch_losses) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [[2], [1, 5]], ids=["two-stages", "three-stages"])
def test_parameter_shared_within_a_stage(split: list[int], method: str) -> None:
    model = chain(inner=[nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
    model[4].weight = model[2].weight
    agrees_with_oracle(model, split, method=method)
    assert model[4].weight is model[2].weight


def test_layer_used_twice_within_a_stage() -> None:
    """Against torch.optim.SGD: torch.func.functional_call, which the oracle uses, puts leaves of
    its own into a module that it meets twice."""
    twice = nn.Linear(WIDTH, WIDTH)
    model, data = chain(inner=[twice, nn.Tanh(), twice]), batches(5)
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in data:
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
    runner_of(model, split=[1], method="bp").fit(data)
    assert largest_difference(model.state_dict(), twin.state_dict()) < TOLERANCE
    assert model[2] is model[4] is twice


def test_parameter_shared_by_two_stages_since_the_last_fit() -> None:
    model = chain()
    runner = runner_of(model, split=[2])
    runner.fit(batches(2))
    model[4].bias = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))
    runner.fit(batches(2))
    model[0].bias = model[2].bias
    with refused(ValueError, "shared by stages 0 and 1"):
        runner.fit(batches(2))


@pytest.mark.parametrize("when", ["new", "later"])
@pytest.mark.parametrize("split", [[2], [3]], ids=["one-stage", "two-stages"])
def test_parameters_tied_by_memory_only(split: list[int], when: str) -> None:
    """``a.data = b.data``: flat memory would give each its own, and untie them without a word."""
    model = chain(inner=[nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
    runner = runner_of(model, split=split) if when == "later" else None
    if runner is not None:
        runner.fit(batches(2))
    model[4].weight.data = model[2].weight.data[:]
    words = ["2.weight", "4.weight", "same memory", "a.weight"]
    with refused(ValueError, *words):
        if runner is None:
            runner_of(model, split=split)
        else:
            runner.fit(batches(2))
    model[4].weight = model[2].weight
    runner_of(model, split=[2]).fit(batches(2))


def test_another_runner_may_cut_elsewhere() -> None:
    """Parameters of one stage lie in one flat memory, but not in the same place."""
    model = chain()
    runner_of(model, split=[2]).fit(batches(2))
    runner_of(model, split=[1]).fit(batches(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", [[0], [2], [4], [0, 2], [2, 4]], ids=str)
def test_frozen_parameters_keep_their_bits(frozen: list[int], method: str) -> None:
    """With one layer per stage a frozen layer is a whole frozen stage."""
    model = chain()
    for index in frozen:
        model[index].requires_grad_(False)
    before = copy.deepcopy([model[index].state_dict() for index in frozen])
    agrees_with_oracle(model, [2, 4], method=method)
    for index, bits in zip(frozen, before, strict=True):
        assert same_bits(model[index].state_dict(), bits)
        assert not any(p.requires_grad for p in model[index].parameters())


def test_partly_frozen_stage() -> None:
    model = chain()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = model[0].weight.clone(), model[2].bias.clone()
    agrees_with_oracle(model, [3])
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].bias, before[1])


@pytest.mark.parametrize("layer", [0, 2, 4], ids=["first-stage", "middle-stage", "last-stage"])
def test_unfreezing_and_freezing_between_fits(layer: int) -> None:
    """Without momentum the oracle, started anew for each fit, says what comes out."""
    model, split, data = chain(), [2, 4], batches(5)
    runner = runner_of(model, 3, split=split, lr=0.1, momentum=0.0)
    for trainable in (True, False, True):
        model[layer].requires_grad_(trainable)
        before = model[layer].weight.clone()
        expected, _ = oracle(model, split, data, lr=0.1, momentum=0.0)
        runner.fit(data)
        assert largest_difference(model.state_dict(), expected) < TOLERANCE
        assert torch.equal(model[layer].weight, before) is not trainable


def test_no_trainable_parameter() -> None:
    with refused(ValueError, "no trainable parameter", "requires_grad"):
        runner_of(chain().requires_grad_(False))
    with refused(ValueError, "no trainable parameter"):
        runner_of([nn.Tanh(), nn.Flatten()])


@pytest.mark.parametrize("split", SPLITS)
def test_everything_frozen_since_the_runner_was_made(split: list[int] | None) -> None:
    model = chain()
    runner = runner_of(model, split=split)
    model.requires_grad_(False)
    with refused(ValueError, "no trainable parameter", model=model):
        runner.fit(batches(2))


# -- dtypes, layouts, gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_weights_a_cpu_does_not_train(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES))
    for layer in model:  # not model.to(dtype), which warns of complex numbers
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach().to(dtype)))
    with refused(TypeError, "0.weight", str(dtype), "model.float()", model=model):
        runner_of(model)


def test_dtypes_mixed_in_a_stage() -> None:
    model = chain()
    model[4].float()
    words = ["stage 1", "torch.float32", "torch.float64", "model.float()", "cut"]
    with refused(TypeError, *words, model=model):
        runner_of(model, split=[2])


def test_dtype_that_changes_at_a_cut() -> None:
    class ToDouble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model = chain(inner=[ToDouble(), nn.Linear(WIDTH, WIDTH)])
    model[0].float()
    data = [(x.float(), y) for x, y in batches(6)]
    expected, _ = oracle(model, [2], data, lr=0.1)
    runner_of(model, split=[2], lr=0.1).fit(data)
    assert largest_difference(model.state_dict(), expected) < 1e-5  # the float32 part
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 4


@pytest.mark.parametrize("split", [[1], [3], None], ids=str)
def test_sparse_gradients(split: list[int] | None) -> None:
    layers = [nn.Embedding(10, WIDTH, sparse=True), nn.Flatten(), nn.Linear(3 * WIDTH, CLASSES)]
    model = nn.Sequential(*layers, nn.Tanh()).double()
    data = [(torch.randint(10, (6, 3)), torch.randint(CLASSES, (6,))) for _ in range(4)]
    with refused(TypeError, "stage 0", "(10, 5)", "sparse", "sparse=False"):
        runner_of(model, split=split).fit(data)
    model[0].sparse = False
    agrees_with_oracle(model, [1], data)


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_convolutions(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    model = model.double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = [
        (torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (5,)))
        for _ in range(6)
    ]
    data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    agrees_with_oracle(model, [2, 4], data, method=method)
    for index in (0, 3):
        assert model[index].weight.is_contiguous(memory_format=torch.channels_last)


# -- layers -------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("split", [[3], None], ids=str)
@pytest.mark.parametrize("at", [2, 5], ids=["before-a-cut", "last-layer"])
def test_layer_that_returns_a_tuple(at: int, split: list[int] | None) -> None:
    model = chain()
    model.insert(at, Pair())
    with refused(TypeError, "returned a tuple", "one tensor", model=model):
        runner_of(model, split=split).fit(batches(3))


def test_tuple_between_two_layers_of_a_stage() -> None:
    """The next layer's own complaint comes out."""
    with refused(TypeError, "linear()", "tuple"):
        runner_of(chain(inner=[nn.Tanh(), Pair()]), split=[2]).fit(batches(3))


def detached(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target).detach()


def without_graph(output: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(output, target)


BAD_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[Exception], list[str]]] = {
    "vector": (lambda o, y: F.cross_entropy(o, y, reduction="none"), TypeError, ["scalar", "(8,)"]),
    "float": (lambda o, y: F.cross_entropy(o, y).item(), TypeError, ["scalar", "float"]),
    "None": (lambda o, y: None, TypeError, ["scalar", "NoneType"]),
    "tuple": (lambda o, y: (F.cross_entropy(o, y), o), TypeError, ["scalar", "tuple"]),
    "detached": (detached, ValueError, ["batch 0", "no trainable parameter", "detached"]),
    "no_grad": (without_graph, ValueError, ["batch 0", "no trainable parameter", "no_grad"]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_loss_that_cannot_be_trained(
    kind: str, split: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times measured with such a loss are not remembered either: they lack the backward."""
    monkeypatch.setenv("FDG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fdg_cuda.layer_times._known", {})
    loss_fn, error, words = BAD_LOSSES[kind]
    model = chain()
    with refused(error, *words, model=model):
        runner_of(model, split=split, loss_fn=loss_fn).fit(batches(3))
    assert list(tmp_path.iterdir()) == []


def test_detached_output() -> None:
    class Detach(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    model = nn.Sequential(*chain(), Detach())
    with refused(ValueError, "batch 0", "detached", model=model):
        runner_of(model, split=[2]).fit(batches(3))


def test_loss_of_one_element() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target).reshape(1)

    agrees_with_oracle(chain(), [2], loss_fn=loss)


def in_place(first: list[nn.Module]) -> nn.Sequential:
    """In-place layers first of all, and behind each of the cuts [2, 4]."""
    linear = [nn.Linear(a, b) for a, b in ((FEATURES, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES))]
    layers = [*first, linear[0], nn.ReLU(inplace=True), linear[1], nn.ELU(inplace=True), linear[2]]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("backward_weights", ["stash", "current"])
@pytest.mark.parametrize("method", METHODS)
def test_in_place_layer_behind_a_cut(method: str, backward_weights: str) -> None:
    data = batches(6)
    before = [x.clone() for x, _ in data]
    model = in_place([nn.LeakyReLU(0.5, inplace=True)])
    agrees_with_oracle(model, [2, 4], data, method=method, backward_weights=backward_weights)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before, strict=True))


@pytest.mark.parametrize("split", [[1, 4], [3, 5], None], ids=str)
def test_in_place_layer_on_a_view_of_the_input(split: list[int] | None) -> None:
    data = batches(6)
    before = [x.clone() for x, _ in data]
    model = in_place([nn.Flatten(), nn.LeakyReLU(0.5, inplace=True)])
    runner = runner_of(copy.deepcopy(model), 3, split=split)
    runner.fit(data)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before, strict=True))
    assert runner.split is not None
    agrees_with_oracle(model, runner.split, data)


def test_evaluate_and_predict_leave_the_input_to_an_in_place_layer() -> None:
    """A list is a loader: a second evaluation must find what the first one found."""
    data = batches(2)
    before = [x.clone() for x, _ in data]
    runner = runner_of(in_place([nn.LeakyReLU(0.5, inplace=True)]), split=[2])
    first = runner.evaluate(data)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, before, strict=True))
    assert runner.evaluate(data) == first
    runner.predict(data[0][0])
    assert torch.equal(data[0][0], before[0])


def test_input_that_requires_grad_gets_none() -> None:
    data = [(x.requires_grad_(), y) for x, y in batches(4)]
    runner_of(chain(), split=[2]).fit(data)
    assert all(x.grad is None and x.requires_grad for x, _ in data)


class Reaching(nn.Module):
    """Multiplies by parameters it keeps in a plain Python list."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        self.hidden = list(parameters)

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.hidden:
            x = x @ parameter
        return x


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("split", [[1], [3]], ids=["in-its-stage", "in-the-other-stage"])
def test_registered_parameter_reached_through_a_list(split: list[int], order: str) -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    inner = [Reaching(linear.weight), nn.Tanh(), linear]
    model = chain(inner=inner if order == "before" else inner[::-1])
    with refused(AliasedParameterError, "(5, 5)", "list", "registers it", "nn.ParameterList"):
        runner_of(model, split=split).fit(batches(5))


def test_unregistered_parameter_reached_through_a_list() -> None:
    """It would never be trained: ``model.parameters()`` does not know it."""
    hidden = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64))
    model = chain(inner=[Reaching(hidden)])
    with refused(AliasedParameterError, "(5, 5)", "nn.ParameterList"):
        runner_of(model, split=[2]).fit(batches(5))


def test_parameter_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights[0] @ self.weights[1]

    agrees_with_oracle(chain(inner=[Listed()]), [2])


class LastOutput(nn.Module):
    """A recurrent layer that passes on its last output only."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0][:, -1]
        return output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_wrapped_recurrent_layer(kind: type[nn.RNNBase], method: str) -> None:
    torch.manual_seed(0)
    layer = kind(input_size=3, hidden_size=WIDTH, batch_first=True)
    model = nn.Sequential(
        LastOutput(layer), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    ).double()
    data = [
        (torch.randn(5, 3, 3, dtype=torch.float64), torch.randint(CLASSES, (5,))) for _ in range(5)
    ]
    agrees_with_oracle(model, [1, 3], data, method=method)
    own = dict(layer.named_parameters())
    assert all(
        weight is own[name]
        for weight, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_layer(method: str, reentrant: bool) -> None:
    """Its backward runs the forward again, which must find the weights of the batch's forward."""

    class Block(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            if not self.checkpointed:
                return self.layers(x)  # type: ignore[no-any-return]
            return checkpoint(self.layers, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    plain, model = chain(inner=[Block(False)]), chain(inner=[Block(True)])
    plain.load_state_dict(model.state_dict())
    expected, _ = oracle(plain, [3], batches(6), lr=0.1, method=method)
    runner_of(model, split=[3], lr=0.1, method=method).fit(batches(6))
    assert largest_difference(model.state_dict(), expected) < TOLERANCE


@pytest.mark.parametrize("split", SPLITS)
def test_buffer_that_is_assigned_anew(split: list[int] | None) -> None:
    """A running mean kept without in-place operations; measuring must leave no trace in it."""

    class RunningMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    model = chain(inner=[RunningMean(), nn.Tanh()])
    runner = runner_of(copy.deepcopy(model), split=split, lr=0.1)
    runner.fit(batches(6))
    assert runner.split is not None
    expected, _ = oracle(model, runner.split, batches(6), lr=0.1)
    assert largest_difference(runner.state_dict(), expected) < TOLERANCE


# -- training and evaluation mode ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_in_evaluation_mode_stays_as_it_is(method: str) -> None:
    """Frozen statistics in one stage, moving ones in the other."""
    frozen, moving = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
    model = chain(inner=[frozen, nn.Linear(WIDTH, WIDTH), moving])
    frozen.running_mean.uniform_(-1, 1)
    frozen.eval()
    before = copy.deepcopy(dict(frozen.named_buffers()))
    agrees_with_oracle(model, [3], method=method)
    assert same_bits(dict(frozen.named_buffers()), before)
    assert int(moving.num_batches_tracked) == 6
    assert not frozen.training
    assert moving.training
    assert model.training


@pytest.mark.parametrize("split", SPLITS)
def test_model_in_evaluation_mode_is_trained(split: list[int] | None) -> None:
    model, twin = chain(inner=[nn.BatchNorm1d(WIDTH)]), chain(inner=[nn.BatchNorm1d(WIDTH)])
    model.eval()
    runner = runner_of(model, split=split)
    runner.fit(batches(4))
    assert all(module.training for module in model.modules())
    runner_of(twin, split=runner.split).fit(batches(4))
    assert same_bits(model.state_dict(), twin.state_dict())
