"""What one recorded forward consists of: the calls made, in order, and the tensors between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fdg_cuda.nested import PLAIN
from fdg_cuda.traced_numbers import Computed, SizeOf, sizes_in

# -- what stands in a call's arguments in place of what was there ---------------------------------


@dataclass(frozen=True)
class Ref:
    """The tensor with this number."""

    value: int


@dataclass(frozen=True)
class Registered:
    """A parameter or buffer of the model, by its first name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A tensor that is neither computed nor registered: a plain attribute, a global."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True)
class Here:
    """The device the sample was on: later, the device of the stage."""


@dataclass(frozen=True)
class ByMode:
    """A plain value that depends on whether the module ``owner`` is in training mode."""

    owner: str
    training: Any
    evaluation: Any


Template = Any  # nested arguments, with the above and expressions in place of tensors and sizes


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` in new containers, with ``function`` of every leaf, those inside slices and sizes
    included."""
    kind = type(tree)
    # Without pytree, which is slow, for what nearly all arguments are.
    if kind is tuple or kind is torch.Size:
        return tuple([map_leaves(function, item) for item in tree])
    if kind is list:
        return [map_leaves(function, item) for item in tree]
    if kind is dict:
        return {key: map_leaves(function, item) for key, item in tree.items()}
    if kind is slice:
        parts = (tree.start, tree.stop, tree.step)
        return slice(*[map_leaves(function, part) for part in parts])
    if isinstance(tree, (Tensor, PackedSequence, *PLAIN)) or pytree.tree_is_leaf(tree):
        return function(tree)
    return pytree.tree_map(lambda leaf: map_leaves(function, leaf), tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves of ``tree`` as :func:`map_leaves` sees them."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def sizes_needed(template: Template) -> set[SizeOf]:
    """The sizes that numbers in ``template`` are computed from."""
    found: set[SizeOf] = set()
    for leaf in leaves(template):
        if isinstance(leaf, SizeOf):
            found.add(leaf)
        elif isinstance(leaf, Computed):
            found |= sizes_in(leaf)
    return found


# -- calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where in the user's code something happened."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f'File "{self.file}", line {self.line}, in {self.function}'


@dataclass(frozen=True)
class Context:
    """Under which settings of the thread a call was made."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # by device type


@dataclass(frozen=True)
class ModuleCall:
    """A module that is called as a whole."""

    path: str


@dataclass(frozen=True)
class Decision:
    """What the model's Python code asked about sizes; later batches must give the same answer."""

    expression: Any
    answer: Any


@dataclass
class Call:
    """One step of a recorded forward.

    Attributes:
        target: the function; or a :class:`ModuleCall`; or a :class:`Decision`, without arguments.
        outputs: the number of the tensor, or the plain value, of each leaf of the result.
        spec: how the leaves make up the result.
        stack: the modules whose forwards were running, the model ("") first.
        mutates: the numbers of all tensors, so far, whose memory it wrote into.
        uses: names of the parameters and buffers it takes part of.
        changes: those of ``uses`` that it wrote into.
        works: whether it computes anything: views, sizes and decisions do not.
    """

    target: Any
    template: Template
    stack: tuple[str, ...]
    place: Place
    context: Context
    outputs: list[Any] = field(default_factory=list)
    spec: Any = None
    mutates: frozenset[int] = frozenset()
    uses: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()
    works: bool = False

    @property
    def name(self) -> str:
        """For people."""
        if isinstance(self.target, ModuleCall):
            return self.target.path
        if isinstance(self.target, Decision):
            return "a decision"
        name = str(getattr(self.target, "__name__", type(self.target).__name__))
        owner = getattr(self.target, "__self__", None)
        return str(getattr(owner, "__name__", name)) if name in ("__get__", "apply") else name

    @property
    def results(self) -> list[int]:
        """Numbers of the tensors it gives."""
        return [output.value for output in self.outputs if isinstance(output, Ref)]

    def same_kind(self, other: Call) -> bool:
        """Whether both call the same thing from the same modules."""
        return self.stack == other.stack and self._kind() == other._kind()

    def _kind(self) -> Any:
        if isinstance(self.target, Decision):
            return "decision"
        return self.target


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the recorded forward, without its memory."""

    shape: torch.Size
    dtype: torch.dtype
    nbytes: int


@dataclass
class Trace:
    """One recorded forward.

    Attributes:
        calls: in the order they were made.
        tensors: by number; the first ``inputs`` of them are the model's inputs.
        output: template of what the model returned.
        visits: the modules that were entered, with the number of calls before: (path, begin, end).
        ambient: the settings of the thread around the forward.
    """

    calls: list[Call]
    tensors: list[TensorInfo]
    inputs: int
    output: Template
    visits: list[tuple[tuple[str, ...], int, int]]
    ambient: Context
