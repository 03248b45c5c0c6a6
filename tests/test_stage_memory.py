"""What stages hold of what layers cost: bytes as counted beside bytes as held in training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from chains import FEATURES, Batch, batches, convolutional, even_split, images, mlp
from several_tensors import Fork, Handing, Join
from torch import Tensor, nn
from torch.nn import functional as F

from fdg_cuda import FDGRunner, costs
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.costs import LayerCost, measure
from fdg_cuda.forms import parcel_of
from fdg_cuda.hops import leaves_of
from fdg_cuda.precision import Precision
from fdg_cuda.schedule import METHODS, Schedule
from fdg_cuda.stage import Stage
from fdg_cuda.stage_memory import Holding, stage_memory

CROSS_ENTROPY = nn.functional.cross_entropy
BATCH = batches(1, last=None)[0]  # 8 samples


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST_PASSES", 1)


@pytest.mark.parametrize("mode", BackwardWeights)
@pytest.mark.parametrize("method", METHODS)
def test_weights_and_momentum_are_those_of_flat_memory(method: str, mode: BackwardWeights) -> None:
    model = mlp()
    measured = measure(list(model), BATCH, CROSS_ENTROPY, threads=1)
    split = even_split(8, 3)
    runner = FDGRunner(model, ["cpu"] * 3, split=split, method=method, backward_weights=mode.value)
    for stage, part in zip(runner.stages, parts(measured, split), strict=True):
        holding = Holding.of(runner.schedule, mode, stage.index)
        needed = stage_memory(part, None, holding)
        snapshot = stage.snapshot()
        assert needed.weights == stage.memory.weight_bytes
        assert needed.optimizer == stage.memory.momentum.nbytes
        assert needed.snapshot == snapshot.weights.nbytes + stage.memory.momentum.nbytes
        assert needed.gradients == 2 * snapshot.weights.nbytes
        assert needed.fixed == sum(b.nbytes for layer in stage.layers for b in layer.buffers())


def parts(measured: list[LayerCost], split: list[int]) -> Iterator[list[LayerCost]]:
    for begin, end in itertools.pairwise([0, *split, len(measured)]):
        yield measured[begin:end]


@pytest.mark.parametrize("mode", BackwardWeights)
def test_hops_of_several_tensors_are_held_packed_and_as_they_are(mode: BackwardWeights) -> None:
    layers = [nn.Linear(FEATURES, FEATURES).double(), Fork(), Handing(), Join()]
    _, fork, handing, _ = measure(layers, BATCH, F.cross_entropy, threads=1)
    holding = Holding.of(Schedule("fdg", 3), mode, 0)
    x = BATCH[0].clone().requires_grad_()
    output = layers[1](x)
    sent, _ = parcel_of(leaves_of(output, frozenset(), Tensor.is_floating_point))
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in output}
    if mode is BackwardWeights.REPLAY:  # the output is made again when its turn comes
        memory = {}
    else:  # the input that is handed on, counted as what the layer before gave
        del memory[x.data_ptr()]
    memory[sent.data_ptr()] = sent.nbytes
    errors, inbox = 3 * handing.error_bytes, 2 * fork.input_bytes
    counted = stage_memory([fork], handing, holding).hops - errors - inbox
    # Packed tensors begin at multiples of 256 bytes.
    assert counted == pytest.approx(4 * sum(memory.values()), abs=4 * 256)


class Held:
    """What autograd keeps of the batches in flight at a stage, and the inputs, as storages."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.most = 0
        self._held: dict[int, dict[int, int]] = {}  # batch -> storages: address -> bytes
        self._forward, self._backward = stage._forward, stage._backward
        stage._forward = self.forward  # type: ignore[method-assign]
        stage._backward = self.backward  # type: ignore[method-assign]

    def forward(self, slot: int, copy: int, batch: int) -> None:
        with self.noting(copy, batch):
            self._forward(slot, copy, batch)
        storage = self.stage._slots[slot].input.untyped_storage()
        self._held[batch][storage.data_ptr()] = storage.nbytes()
        self.look()

    def backward(self, slot: int, copy: int, batch: int, row: int = 0) -> None:
        with self.noting(copy, batch):
            self._backward(slot, copy, batch, row)
        self.look()
        del self._held[batch]

    def noting(self, copy: int, batch: int) -> torch.autograd.graph.saved_tensors_hooks:
        buffers = [buffer for layer in self.stage.layers for buffer in layer.buffers()]
        own = {t.untyped_storage().data_ptr() for t in (*self.stage.memory.leaves[copy], *buffers)}
        held = self._held.setdefault(batch, {})

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)

    def look(self) -> None:
        if 0 in self._held:  # works on a copy of its input, to find out whether it is changed
            return
        self.most = max(self.most, sum(sum(held.values()) for held in self._held.values()))


@pytest.mark.parametrize("mode", BackwardWeights)
@pytest.mark.parametrize("kind", ["mlp", "convolutional", "bfloat16"])
def test_activations_are_what_autograd_keeps_in_training(kind: str, mode: BackwardWeights) -> None:
    model, data = chain_of(kind)
    precision = Precision.BFLOAT16 if kind == "bfloat16" else Precision.FLOAT32
    measured = measure(list(model), data[0], CROSS_ENTROPY, threads=1, precision=precision)
    split = [2, 4] if kind == "convolutional" else [3, 5]
    runner = FDGRunner(
        model, ["cpu"] * 3, split=split, backward_weights=mode.value, precision=precision.value
    )
    watches = [Held(stage) for stage in runner.stages]
    runner.fit(data)
    for held, part in zip(watches, parts(measured, split), strict=True):
        holding = Holding.of(runner.schedule, mode, held.stage.index)
        assert stage_memory(part, None, holding).activations == held.most


def chain_of(kind: str) -> tuple[nn.Sequential, list[Batch]]:
    if kind == "convolutional":
        return convolutional(), images(8)
    if kind == "bfloat16":
        data = [(x.float(), y) for x, y in batches(8, last=None)]
        return mlp().float(), data
    return mlp(), batches(8, last=None)
