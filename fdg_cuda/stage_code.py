"""A stretch of a chain's calls as Python source: one line per call, values in local variables."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.trace import (
    ByMode,
    Call,
    Constant,
    Context,
    Decision,
    Here,
    ModuleCall,
    Ref,
    Registered,
    Template,
    leaves,
    sizes_needed,
)
from fdg_cuda.traced_numbers import OPERATIONS, Computed, SizeOf

_LITERALS = (bool, int, str, type(None))
_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "truediv": "/",
    "mod": "%",
    "pow": "**",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}


def sizes_of(tensor: Tensor) -> Tensor:
    """An empty tensor whose shape is (0, *sizes of ``tensor``): carries sizes where the values are
    no longer needed. It has no gradient."""
    return torch.empty((0, *tensor.shape), dtype=torch.uint8, device=tensor.device)


class Source:
    """Collects the lines of one function ``forward(self, hop)``.

    Args:
        names: how a module, parameter, buffer or constant is reached from ``self``.
    """

    def __init__(self, names: Callable[[Any], str]) -> None:
        self._names = names
        self._lines: list[str] = []
        self.namespace: dict[str, Any] = {"inf": math.inf, "nan": math.nan}
        self._bound: dict[int, str] = {}
        self._kept: list[Any] = []
        self._here: set[int] = set()  # tensors at hand as themselves
        self._device: str | None = None

    def bind(self, value: Any, hint: str) -> str:
        """A name for ``value`` in the function's globals."""
        if id(value) not in self._bound:
            word = "".join(c if c.isalnum() else "_" for c in hint).strip("_") or "value"
            self._bound[id(value)] = name = f"{word}_{len(self._bound)}"
            self.namespace[name] = value
            self._kept.append(value)  # its id stands for it
        return self._bound[id(value)]

    def line(self, text: str, comment: str = "") -> None:
        """Add a line."""
        self._lines.append(f"    {text}  # {comment}" if comment else f"    {text}")

    def take(self, carried: Sequence[tuple[int, bool]], source: str, *, bare: bool) -> None:
        """Name what came in: (number, whether it is the tensor itself rather than its sizes)."""
        names = [variable(*item) for item in carried]
        self.line(f"{names[0] if bare else ', '.join(names) + ','} = {source}")
        self._here |= {number for number, itself in carried if itself}
        self._device = f"{names[0]}.device"

    def clone(self, number: int) -> None:
        """What came in is written into here: that is for this stage to see."""
        self.line(f"v{number} = v{number}.clone()", "written into below")

    def call(self, call: Call, ambient: Context) -> None:
        """The line, or lines, of one call."""
        place = f"{call.place.file}:{call.place.line}"
        if isinstance(call.target, Decision):
            check = self.bind(_Check(call), "decided")
            self.line(f"{check}({self.emit(call.target.expression)})", place)
            return
        args, kwargs = call.template
        given = [self.emit(arg) for arg in args]
        for key, value in kwargs.items():
            if key.isidentifier():
                given.append(f"{key}={self.emit(value)}")
            else:
                given.append(f"**{{{key!r}: {self.emit(value)}}}")
        if isinstance(call.target, ModuleCall):
            target = self._names(call.target)
        else:
            target = self.bind(call.target, call.name)
        if call.context != ambient:
            target = f"{self.bind(_Under(call.context, ambient), 'under')}({target})"
        text = f"{target}({', '.join(given)})"
        results = call.results
        if not results:
            only = call.outputs
            text = text if only == [None] or not only else self._unpacked(call, text)
            self.line(text, place)
        elif len(call.outputs) == 1 and call.spec == _LEAF:
            self.line(f"v{results[0]} = {text}", place)
        else:
            names = "".join(f"v{number}, " for number in results)
            self.line(f"{names.rstrip()} = {self._unpacked(call, text)}", place)
        self._here |= set(results)

    def _unpacked(self, call: Call, text: str) -> str:
        return f"{self.bind(_Unpack(call), 'unpack')}({text})"

    def release(self, numbers: Sequence[str]) -> None:
        """Let go of variables."""
        if numbers:
            self.line(f"del {', '.join(numbers)}")

    def give(self, carried: Sequence[tuple[int, bool]], *, bare: bool) -> None:
        """Hand on what the next stage takes."""
        names = []
        for number, itself in carried:
            if itself or number not in self._here:
                names.append(variable(number, itself))
            else:
                names.append(f"{self.bind(sizes_of, 'sizes_of')}(v{number})")
        self.line(f"return {names[0]}" if bare else f"return ({', '.join(names)},)")

    def finish(self, output: Template) -> None:
        """Return what the model returns."""
        self.line(f"return {self.emit(output)}")

    def emit(self, leaf: Template) -> str:
        """``leaf``, or a container of such, as an expression."""
        if isinstance(leaf, Ref):
            return f"v{leaf.value}"
        if isinstance(leaf, (Registered, Constant)):
            return self._names(leaf)
        if isinstance(leaf, ByMode):
            owner = self._names(leaf)
            return f"({self.emit(leaf.training)} if {owner}.training else {self.emit(leaf.evaluation)})"
        if isinstance(leaf, Here):
            assert self._device is not None
            return self._first_device()
        if isinstance(leaf, SizeOf):
            if leaf.value in self._here:
                return f"v{leaf.value}.shape[{leaf.dim}]"
            return f"s{leaf.value}.shape[{leaf.dim + 1}]"
        if isinstance(leaf, Computed):
            operands = [self.emit(operand) for operand in leaf.operands]
            if leaf.operation in _INFIX:
                return f"({operands[0]} {_INFIX[leaf.operation]} {operands[1]})"
            name = self.bind(OPERATIONS[leaf.operation], leaf.operation)
            return f"{name}({', '.join(operands)})"
        if type(leaf) in _LITERALS or (type(leaf) is float and math.isfinite(leaf)):
            return (
                repr(leaf) if not (isinstance(leaf, (int, float)) and leaf < 0) else f"({leaf!r})"
            )
        return self._emit_container(leaf)

    def _emit_container(self, leaf: Any) -> str:
        kind = type(leaf)
        if kind is tuple:
            return f"({''.join(self.emit(item) + ', ' for item in leaf)})"
        if kind is list:
            return f"[{', '.join(map(self.emit, leaf))}]"
        if kind is slice:
            parts = (leaf.start, leaf.stop, leaf.step)
            return f"{self.bind(slice, 'slice')}({', '.join(map(self.emit, parts))})"
        found, spec = pytree.tree_flatten(leaf)
        if spec == _LEAF:
            return self.bind(leaf, kind.__name__)
        rebuild = self.bind(pytree.tree_unflatten, "tree_unflatten")
        return f"{rebuild}([{', '.join(map(self.emit, found))}], {self.bind(spec, 'spec')})"

    def _first_device(self) -> str:
        return "device"

    def compiled(self, name: str, *, uses_device: bool) -> tuple[str, Callable[..., Any]]:
        """The source, and the function it makes."""
        lines = list(self._lines)
        if uses_device:
            lines.insert(1, f"    device = {self._device}")
        text = "\n".join(["def forward(self, hop):", *lines, ""])
        file = f"<{name}>"
        # So that tracebacks show the lines.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), self.namespace)
        function: Callable[..., Any] = self.namespace["forward"]
        return text, function


_LEAF = pytree.tree_flatten(0)[1]


def variable(number: int, itself: bool) -> str:
    """The local variable of a tensor, or of its sizes."""
    return f"v{number}" if itself else f"s{number}"


def variables_read(template: Template, here: set[int]) -> set[str]:
    """The variables an expression reads if the tensors ``here`` are at hand as themselves."""
    found = {f"v{leaf.value}" for leaf in leaves(template) if isinstance(leaf, Ref)}
    return found | {variable(size.value, size.value in here) for size in sizes_needed(template)}


class _Check:
    """A decision of the model's code is asked for again."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._answer = call.target.answer

    def __call__(self, answer: Any) -> None:
        if answer != self._answer:
            raise ModelCaptureError(
                f"the model's code goes another way for this input than for the sample it was captured "
                f"with: {_brief(self._call.target.expression)} is {answer} instead of {self._answer} "
                f"({self._call.place}). Give batches of the sample's sizes, or capture with "
                f"such a sample."
            )


class _Unpack:
    """The tensors out of a nested result; what else is in it must be as it was."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, result: Any) -> list[Tensor]:
        found, spec = pytree.tree_flatten(result)
        call = self._call
        if spec != call.spec:
            raise ModelCaptureError(
                f"{call.name} returned {spec} instead of {call.spec}, as it did for the sample the "
                f"model was captured with ({call.place})"
            )
        for now, then in zip(found, call.outputs, strict=True):
            if isinstance(then, Ref) != isinstance(now, Tensor) or (
                not isinstance(then, Ref) and now != then
            ):
                raise ModelCaptureError(
                    f"{call.name} returned {now!r:.60} where it returned {then!r:.60} for the sample "
                    f"the model was captured with, and what follows may depend on it ({call.place})"
                )
        return [leaf for leaf in found if isinstance(leaf, Tensor)]


class _Under:
    """Calls a function under the settings it was called under in the model's code."""

    def __init__(self, context: Context, ambient: Context) -> None:
        self._no_grad = ambient.grad and not context.grad
        self._autocast = [
            own
            for own, around in zip(context.autocast, ambient.autocast, strict=True)
            if own != around
        ]

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def under(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as settings:
                grad = torch.is_grad_enabled() and not self._no_grad
                settings.enter_context(torch.set_grad_enabled(grad))
                for kind, enabled, dtype in self._autocast:
                    settings.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                return function(*args, **kwargs)

        return under


def _brief(expression: Any) -> str:
    """An expression of sizes, for people."""
    if isinstance(expression, SizeOf):
        return f"size {expression.dim} of a tensor"
    if isinstance(expression, Computed):
        operands = [_brief(operand) for operand in expression.operands]
        if expression.operation in _INFIX:
            return f"({f' {_INFIX[expression.operation]} '.join(operands)})"
        return f"{expression.operation}({', '.join(operands)})"
    return str(expression)
