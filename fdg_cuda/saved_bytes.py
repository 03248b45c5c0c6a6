"""How much autograd keeps of one batch from each layer's forward to its backward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fdg_cuda.nested import Nested, distinct


@dataclass(frozen=True)
class Kept:
    """Bytes of distinct storages that autograd keeps of one layer, beside parameters and buffers.

    Attributes:
        saved: beside its input.
        kept_input: of its input, beside what the layers before keep of it.
        kept_output: of its output, whether this layer keeps it or, where it hands a tensor through, one
            before.
    """

    saved: int
    kept_input: int
    kept_output: int


class SavedBytes:
    """Counts layer by layer, in the order of the chain: the layer's forward on a clone of what the
    layer before gave runs in what :meth:`begin` returns, then comes :meth:`end`.

    A layer that works in place on its input counts it as saved, not as input: a stage that begins
    with it works on a copy. Where a tensor is handed through several layers and kept by a later one,
    a cut between them makes the stage above count it twice.

    Attributes:
        layers: of each layer that was seen.
    """

    def __init__(self) -> None:
        self.layers: list[Kept] = []
        self._input_is_kept: list[bool] = []  # per tensor; by the layers before
        self._inputs: list[Tensor] = []
        self._versions: list[int] = []
        self._registered: set[int] = set()
        self._saved: dict[int, int] = {}  # bytes of each storage, by its address

    def begin(self, layer: nn.Module, value: Nested) -> AbstractContextManager[object]:
        """``layer`` is about to take ``value``."""
        self._inputs = distinct(value)
        if not self.layers:
            self._input_is_kept = [False] * len(self._inputs)
        self._versions = [tensor._version for tensor in self._inputs]
        self._registered = {_address(t) for t in (*layer.parameters(), *layer.buffers())}
        self._saved = {}
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def end(self, output: Nested) -> None:
        """It gave ``output``."""
        taken = {
            _address(tensor): kept
            for tensor, version, kept in zip(
                self._inputs, self._versions, self._input_is_kept, strict=True
            )
            if tensor._version == version
        }
        given = distinct(output)
        output_is_kept = [self._is_kept(_address(tensor), taken) for tensor in given]
        self.layers.append(
            Kept(
                saved=sum(n for address, n in self._saved.items() if address not in taken),
                kept_input=sum(
                    self._saved.get(address, 0) for address, kept in taken.items() if not kept
                ),
                kept_output=sum(
                    tensor.nbytes
                    for tensor, kept in zip(given, output_is_kept, strict=True)
                    if kept
                ),
            )
        )
        self._input_is_kept = output_is_kept
        self._inputs = []

    def _is_kept(self, address: int, taken: dict[int, bool]) -> bool:
        return address in self._saved or taken.get(address, False)

    def _note(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._registered:
            self._saved[address] = _storage_bytes(tensor)
        # Itself, where it is what its operation gives, would hold the operation that holds it: a cycle
        # that nothing breaks if no backward comes.
        return tensor.detach()


def _address(tensor: Tensor) -> int:
    """Where the tensor's storage lies."""
    dense = _dense(tensor)
    return 0 if dense is None else dense.untyped_storage().data_ptr()


def _storage_bytes(tensor: Tensor) -> int:
    dense = _dense(tensor)
    return 0 if dense is None else dense.untyped_storage().nbytes()


def _dense(tensor: Tensor) -> Tensor | None:
    """What has a storage: of a sparse tensor its values. None for layouts that have none to speak of."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor.detach()._values() if tensor.layout == torch.sparse_coo else None
