"""A stage of a captured model: the user's own modules, and the calls between them."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda.call_form import InputForm
from fdg_cuda.nested import Nested
from fdg_cuda.stage_code import Source, variable, variables_read
from fdg_cuda.trace import (
    ByMode,
    Call,
    Constant,
    Context,
    Decision,
    Here,
    ModuleCall,
    Registered,
    Template,
    leaves,
)

# A tensor's number, and whether the tensor itself is meant rather than its sizes.
Carried = tuple[int, bool]


@dataclass(frozen=True)
class Stretch:
    """What a stage consists of.

    Attributes:
        calls: in order.
        takes, gives: what crosses the cuts before and behind; None at the chain's ends.
        inputs: how the model's inputs are found in a batch's, and how many tensors they are.
        output: what the model returns, if this is the last stage.
        clones: numbers of tensors that cross the cut before and are written into here.
        borrowed: names of buffers that belong to an earlier stage, of which this one has a copy.
        ambient: the settings of the thread around the model's forward.
        title: for tracebacks.
    """

    calls: Sequence[Call]
    takes: Sequence[Carried] | None
    gives: Sequence[Carried] | None
    inputs: tuple[InputForm, int]
    output: Template
    clones: Sequence[int]
    borrowed: frozenset[str]
    ambient: Context
    title: str


class GraphStage(nn.Module):
    """Takes what crosses the cut before it and gives what crosses the cut behind it: one tensor as it
    is, several as a tuple. The first takes a batch's input, the last gives the model's output.

    What later stages need and this one does not is handed through, the same tensor.

    Its modules are the model's own, and so are parameters that the model's code uses directly (not
    through one of torch's layers). What the code does by mode follows the model's modules, not the
    mode of this one.

    Attributes:
        code: what it runs, as Python source.
    """

    def __init__(self, model: nn.Module, stretch: Stretch) -> None:
        super().__init__()
        # Not as submodules: they hold other stages' parameters too.
        self._owners: tuple[nn.Module, ...] = ()
        self._homes: dict[str, tuple[nn.Module, str]] = {}  # of the buffers, by our own names
        # Id and version of what was copied, by our own names.
        self._copies: dict[str, tuple[int, int]] = {}
        self._model = (model,)
        self._stretch = stretch
        self._named: dict[Any, str] = {}
        self.code, self._run = self._written()

    def forward(self, hop: Nested) -> Nested:
        if self._copies:
            self._copy_anew()
        return self._run(self, hop)

    def refresh(self) -> None:
        """Follow the model's buffers: those that were replaced (``model.double()`` does), and what was
        written into those that belong to an earlier stage."""
        for name, (owner, key) in self._homes.items():
            now, source = self._buffers[name], owner._buffers[key]
            assert now is not None
            if source is None or source is now:
                continue
            if name not in self._copies:
                self._buffers[name] = source
            elif (source.shape, source.dtype) != (now.shape, now.dtype):
                self._buffers[name] = source.detach().to(now.device, copy=True)
        self._copy_anew()

    def _copy_anew(self) -> None:
        for name, known in self._copies.items():
            owner, key = self._homes[name]
            source, copy = owner._buffers[key], self._buffers[name]
            if source is not None and copy is not None and known != (id(source), source._version):
                with torch.no_grad():
                    copy.copy_(source)
                self._copies[name] = (id(source), source._version)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphStage:
        """Where a move replaces a buffer the model's module gets the new one too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, (owner, key) in self._homes.items():
            if name not in self._copies:
                owner._buffers[key] = self._buffers[name]
        return self

    # -- writing the code -------------------------------------------------------------------------

    def _written(self) -> tuple[str, Callable[[GraphStage, Nested], Nested]]:
        stretch = self._stretch
        source = Source(self._attribute)
        incoming = self._incoming(source)
        for number in stretch.clones:
            source.clone(number)
        here = {number for number, itself in incoming if itself}
        here |= {number for call in stretch.calls for number in call.results}
        last = self._last_reads(here)
        source.release([name for item in incoming if (name := variable(*item)) not in last])
        for index, call in enumerate(stretch.calls):
            source.call(call, stretch.ambient)
            read = variables_read(call.template, here)
            read |= {f"v{number}" for number in call.results}
            source.release(sorted(name for name in read if last.get(name, -1) <= index))
        if stretch.gives is None:
            source.finish(stretch.output)
        else:
            source.give(stretch.gives, bare=len(stretch.gives) == 1)
        uses_device = any(
            isinstance(leaf, Here) for call in stretch.calls for leaf in leaves(call.template)
        )
        return source.compiled(stretch.title, uses_device=uses_device)

    def _incoming(self, source: Source) -> Sequence[Carried]:
        if self._stretch.takes is not None:
            source.take(self._stretch.takes, "hop", bare=len(self._stretch.takes) == 1)
            return self._stretch.takes
        form, count = self._stretch.inputs
        takes = [(number, True) for number in range(count)]
        source.take(takes, f"{source.bind(form.tensors, 'inputs')}(hop)", bare=False)
        return takes

    def _last_reads(self, here: set[int]) -> dict[str, int]:
        """The index of the last call that reads each variable; past the end for what is given."""
        stretch = self._stretch
        last: dict[str, int] = {}
        for index, call in enumerate(stretch.calls):
            for name in variables_read(call.template, here):
                last[name] = index
        if stretch.gives is None:
            given = variables_read(stretch.output, here)
        else:
            given = {variable(n, itself or n in here) for n, itself in stretch.gives}
        return last | dict.fromkeys(given, len(stretch.calls))

    def _attribute(self, leaf: Any) -> str:
        """How the code reaches what ``leaf`` stands for, which is made an attribute if it is none."""
        (model,) = self._model
        if isinstance(leaf, ByMode):
            owner = model.get_submodule(leaf.owner)
            if owner not in self._owners:
                self._owners = (*self._owners, owner)
            return f"self._owners[{self._owners.index(owner)}]"
        key = id(leaf.tensor) if isinstance(leaf, Constant) else leaf
        if key not in self._named:
            self._named[key] = self._add(model, leaf)
        return f"self.{self._named[key]}"

    def _add(self, model: nn.Module, leaf: Any) -> str:
        if isinstance(leaf, Constant):
            name = f"constant_{len(self._named)}"
            self.register_buffer(name, leaf.tensor, persistent=False)
        elif isinstance(leaf, ModuleCall):
            name = self._own_name(leaf.path)
            self.add_module(name, model.get_submodule(leaf.path))
        else:
            assert isinstance(leaf, Registered)
            name = self._own_name(leaf.name)
            path, _, key = leaf.name.rpartition(".")
            owner = model.get_submodule(path)
            if owner._parameters.get(key) is not None:
                self.register_parameter(name, owner._parameters[key])
            else:
                self._add_buffer(name, owner, key, copied=leaf.name in self._stretch.borrowed)
        return name

    def _add_buffer(self, name: str, owner: nn.Module, key: str, *, copied: bool) -> None:
        buffer = owner._buffers[key]
        assert buffer is not None
        self._homes[name] = (owner, key)
        if copied:
            self._copies[name] = (id(buffer), buffer._version)
            buffer = buffer.detach().clone()
        self.register_buffer(name, buffer, persistent=False)

    def _own_name(self, path: str) -> str:
        name = "".join(c if c.isalnum() else "_" for c in path.replace(".", "__"))
        if name[0].isdigit() or keyword.iskeyword(name):
            name = f"_{name}"
        while hasattr(self, name):
            name += "_"
        return name

    def extra_repr(self) -> str:
        works = sum(not isinstance(call.target, Decision) for call in self._stretch.calls)
        return f"{works} calls; .code shows them"


def modes_of(layer: nn.Module) -> list[bool]:
    """Of all modules whose mode ``layer`` may follow, whether they are in training mode."""
    followed = layer._owners if isinstance(layer, GraphStage) else ()
    return [module.training for module in (*layer.modules(), *followed)]
