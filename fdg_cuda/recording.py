"""Runs a model on a sample and writes down its forward's calls: a :class:`~fdg_cuda.trace.Trace`.

The model really runs, on real tensors. A ``TorchFunctionMode`` sees every call of torch, and modules
that are called as a whole (torch's own, and ``opaque`` ones) are seen in ``nn.Module.__call__``. So
``isinstance``, containers, closures and Python's own control flow are what they always are; only sizes
are numbers with a memory (:mod:`fdg_cuda.traced_numbers`), and only values cannot be looked at.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fdg_cuda.torch_facts import FACTS, HANDED_ON, RESHAPING, has_hooks, is_layer
from fdg_cuda.trace import (
    Call,
    Constant,
    Context,
    Decision,
    Here,
    ModuleCall,
    Place,
    Ref,
    Registered,
    Template,
    TensorInfo,
    Trace,
    leaves,
    map_leaves,
)
from fdg_cuda.traced_numbers import (
    Computed,
    Expression,
    Number,
    SizeOf,
    TracedFloat,
    TracedInt,
    expression_of,
    plain,
    traced,
)
from fdg_cuda.watching import Attributes, watched

_PACKAGES = tuple(
    str(Path(file).parent) + "/" for file in (torch.__file__, __file__) if file is not None
)


class Blocked(Exception):  # noqa: N818 (caught inside this package only)
    """A forward that cannot be recorded as a chain of calls.

    Attributes:
        reason: what was in the way.
        stack: the modules whose forwards were running.
        place: where, in the user's code; None: known only by the module.
        final: running the module as a whole would not help.
    """

    def __init__(
        self, reason: str, stack: tuple[str, ...], place: Place | None, *, final: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.stack, self.place, self.final = reason, stack, place, final


def record(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    opaque: frozenset[str],
) -> Trace:
    """What ``model(*args, **kwargs)`` calls.

    The tensors in the arguments may be written into. Attributes that modules set are put back;
    buffers and random states are the caller's business.

    Args:
        opaque: paths of modules to be called as a whole.

    Raises:
        Blocked: it cannot be recorded.
    """
    recorder = _Recorder(model, opaque)
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    recorder.device = next((tensor.device for tensor in inputs), recorder.device)
    for tensor in inputs:
        recorder.know(tensor, symbolic=True)
    with recorder.watching():
        output = model(*args, **kwargs)
    if recorder.blocked is not None:  # swallowed by an except of the user's
        raise recorder.blocked
    return Trace(
        recorder.calls,
        recorder.infos,
        len(inputs),
        map_leaves(recorder.reference, output),
        recorder.visits,
        recorder.ambient,
    )


def first_names(model: nn.Module) -> dict[int, str]:
    """Of all parameters and buffers, by id; of one with several names the first."""
    names: dict[int, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), name)
    return names


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, opaque: frozenset[str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.infos: list[TensorInfo] = []
        self.visits: list[tuple[tuple[str, ...], int, int]] = []
        self.ambient = _context()
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.blocked: Blocked | None = None
        self._names = first_names(model)
        self._modules: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._modules.setdefault(id(module), path)
        self._model = model
        self._opaque = opaque
        self._stack: tuple[str, ...] = ()
        self._dice = random.getstate()
        self._inside = 0  # a call that is recorded as a whole
        self._thread = threading.get_ident()
        # By id. The tensors are kept: an id must not be given anew.
        self._known: dict[int, tuple[Tensor, int]] = {}
        self._symbolic: set[int] = set()  # numbers of tensors that depend on the inputs
        self._by_memory: dict[int, list[int]] = {}
        self._decisions: set[tuple[Any, Any]] = set()

    # -- tensors ----------------------------------------------------------------------------------

    def know(self, tensor: Tensor, *, symbolic: bool) -> Ref:
        """Number ``tensor``."""
        number = len(self.infos)
        self.infos.append(TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.nbytes))  # type: ignore[arg-type]
        self._known[id(tensor)] = (tensor, number)
        if symbolic:
            self._symbolic.add(number)
        self._by_memory.setdefault(_memory(tensor), []).append(number)
        return Ref(number)

    def reference(self, leaf: Any) -> Template:
        """What stands for ``leaf`` in a template."""
        if isinstance(leaf, (TracedInt, TracedFloat)):
            return leaf.expression
        if not isinstance(leaf, Tensor):
            if isinstance(leaf, torch.device) and leaf == self.device:
                return Here()
            if isinstance(leaf, HANDED_ON):
                return leaf
            raise self._block(
                f"a {type(leaf).__name__} is passed on, in which tensors could not be followed"
            )
        if id(leaf) in self._known:
            return Ref(self._known[id(leaf)][1])
        if id(leaf) in self._names:
            return Registered(self._names[id(leaf)])
        if leaf.grad_fn is not None:
            raise self._block(
                "a tensor was computed by something that torch's functions do not show"
            )
        if leaf.requires_grad:
            raise self._block(
                f"a tensor of shape {tuple(leaf.shape)} wants a gradient, but is no registered "
                f"parameter of the model, so it would never be trained; keep it as an nn.Parameter "
                f"attribute of a module, or in an nn.ParameterList",
                final=True,
            )
        return Constant(leaf)

    def _own_tensors(self, path: str) -> list[Tensor]:
        module = self._model.get_submodule(path)
        return [*module.parameters(), *module.buffers()]

    def _number(self, value: Any) -> int | None:
        """The number of a tensor that depends on the inputs; None of anything else."""
        if isinstance(value, Tensor) and id(value) in self._known:
            number = self._known[id(value)][1]
            return number if number in self._symbolic else None
        return None

    def _size(self, number: int, tensor: Tensor, dim: int) -> Any:
        return traced(tensor.shape[dim], SizeOf(number, dim % tensor.ndim), self.decided)

    # -- what is watched --------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """All calls are seen; afterwards modules have the attributes they had."""
        attributes = Attributes(self._model)
        try:
            with (
                watched(self._is_watching, self._module, self._call),
                torch.inference_mode(False),
                self,
            ):
                yield
            self._check_attributes(attributes)
        finally:
            attributes.restore()

    def _is_watching(self) -> bool:
        return self._inside == 0 and threading.get_ident() == self._thread

    def _check_attributes(self, attributes: Attributes) -> None:
        wholes = tuple(
            path + "."
            for path, module in self._model.named_modules(remove_duplicate=False)
            if self._runs_as_a_whole(path, module)
        )
        for module, key in attributes.changed():
            path = self._modules[id(module)]
            if not (path + ".").startswith(wholes):
                raise Blocked(
                    f"its forward sets the attribute {key!r}, which a recorded forward would not do "
                    f"again",
                    ("",) if path == "" else ("", path),
                    None,
                )

    def _runs_as_a_whole(self, path: str, module: nn.Module) -> bool:
        return path != "" and (path in self._opaque or is_layer(module) or has_hooks(module))

    # -- calls ------------------------------------------------------------------------------------

    def _module(
        self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        path = self._modules.get(id(module))
        if path is None:  # not the model's: what it computes is recorded, call by call
            return call(module, *args, **kwargs)
        if self._runs_as_a_whole(path, module):
            self._check_dice()
            try:
                return self._call(
                    ModuleCall(path), args, kwargs, run=lambda *a, **k: call(module, *a, **k)
                )
            finally:
                self._dice = random.getstate()
        self._check_dice()
        outer, begin = self._stack, len(self.calls)
        self._stack = (*outer, path)
        try:
            result = call(module, *args, **kwargs)
            self._check_dice()
        finally:
            self.visits.append((self._stack, begin, len(self.calls)))
            self._stack = outer
        return result

    def _check_dice(self) -> None:
        if random.getstate() != self._dice:
            raise self._block("its forward draws from Python's random module")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_watching():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        number = self._number(args[0]) if args else None
        if number is not None:
            answer = self._about_sizes(func, name, number, args, kwargs)
            if answer is not None:
                return answer
        if name == "__get__":  # of an attribute
            result = func(*args)
            return self._call(func, args, kwargs) if isinstance(result, Tensor) else result
        if name in RESHAPING:
            raise self._block(f"{name} changes the shape of a tensor in place")
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            raise self._block("it computes gradients inside the forward")
        if not any(isinstance(leaf, Tensor) for leaf in leaves((args, kwargs))):
            return self._without_tensors(func, args, kwargs)
        if name in FACTS and not (name == "type" and len(args) + len(kwargs) > 1):
            if name in ("_assert", "_assert_async"):
                return self._call(func, args, kwargs)
            return func(*map_leaves(plain, args), **map_leaves(plain, kwargs))
        return self._call(func, args, kwargs)

    def _about_sizes(
        self, func: Any, name: str, number: int, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The answer with its history, if sizes are what is asked for."""
        tensor = args[0]
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute != "shape":
                return None
            name, args, kwargs = "size", (tensor,), {}
        if name == "size":
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if dim is None:
                return torch.Size(self._size(number, tensor, d) for d in range(tensor.ndim))
            return self._size(number, tensor, plain(dim))
        if name in ("numel", "nelement"):
            count: Any = 1
            for dim in range(tensor.ndim):
                count = count * self._size(number, tensor, dim)
            return count
        if name == "__len__":  # called by other means than len()
            self.decided(SizeOf(number, 0), len(tensor))
            return len(tensor)
        return None

    def _without_tensors(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A tensor made of nothing (zeros, arange, rand) is a call as any other; else a setting."""
        name = getattr(func, "__name__", "")
        if name in ("_set_grad_enabled", "_assert"):
            return func(*map_leaves(plain, args), **map_leaves(plain, kwargs))
        try:
            self.reference_all((args, kwargs))
        except Blocked:
            self.blocked = None
            return func(*args, **kwargs)
        return self._call(func, args, kwargs, only_if_tensors=True)

    def reference_all(self, tree: Any) -> Template:
        return map_leaves(self.reference, tree)

    def _call(
        self,
        target: Any,
        args: Any,
        kwargs: dict[str, Any],
        *,
        run: Callable[..., Any] | None = None,
        only_if_tensors: bool = False,
    ) -> Any:
        """Make the call and write it down. What it calls in turn is not looked at."""
        self._inside += 1
        try:
            return self._call_unwatched(target, args, kwargs, run or target, only_if_tensors)
        finally:
            self._inside -= 1

    def _call_unwatched(
        self,
        target: Any,
        args: Any,
        kwargs: dict[str, Any],
        run: Callable[..., Any],
        only_if_tensors: bool,
    ) -> Any:
        template = self.reference_all((args, kwargs))
        arguments = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        references = leaves(template)
        call = Call(target, template, self._stack, self._place(), _context())
        names = {leaf.name for leaf in references if isinstance(leaf, Registered)}
        watched = list(arguments)
        if isinstance(target, ModuleCall):
            own = self._own_tensors(target.path)
            watched += own
            names |= {self._names[id(tensor)] for tensor in own}
        before = [(tensor, tensor._version) for tensor in watched]
        result = run(*map_leaves(plain, args), **map_leaves(plain, kwargs))
        changed = [tensor for tensor, version in before if tensor._version != version]
        call.uses = frozenset(names)
        call.changes = frozenset(self._names[id(t)] for t in changed if id(t) in self._names)
        memories = {_memory(tensor) for tensor in changed}
        if any(
            id(t) not in self._known and id(t) not in self._names and _memory(t) in memories
            for t in arguments
        ):
            raise self._block(
                "it writes into a tensor that is neither computed in the forward nor registered; "
                "make that a buffer (register_buffer)"
            )
        symbolic = any(
            isinstance(leaf, (SizeOf, Computed))
            or (isinstance(leaf, Ref) and leaf.value in self._symbolic)
            for leaf in references
        )
        found, call.spec = pytree.tree_flatten(result)
        tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
        if not tensors and not changed and not symbolic and only_if_tensors:
            return result
        self._check_result(call, found)
        given = {_memory(tensor) for tensor in arguments}
        call.works = bool(changed) or any(_memory(tensor) not in given for tensor in tensors)
        for index, leaf in enumerate(found):
            if isinstance(leaf, Tensor):
                tensor = leaf
                if (id(leaf) in self._known or id(leaf) in self._names) and (
                    _memory(leaf) not in memories
                ):
                    # What was handed through is another value of the chain, as it would be in the
                    # other mode (a dropout's, say).
                    tensor = _alias(leaf)
                    found[index] = tensor
                call.outputs.append(self.know(tensor, symbolic=symbolic))
            else:
                call.outputs.append(leaf)
        call.mutates = frozenset(n for memory in memories for n in self._by_memory.get(memory, ()))
        self.calls.append(call)
        if any(new is not old for new, old in zip(found, pytree.tree_leaves(result), strict=True)):
            return pytree.tree_unflatten(found, call.spec)
        return result

    def _check_result(self, call: Call, found: list[Any]) -> None:
        """Numbers read out of tensors cannot be followed, modules aside: theirs are asked again."""
        for leaf in found:
            if isinstance(leaf, Tensor) or leaf is None:
                continue
            if not isinstance(leaf, HANDED_ON):
                raise self._block(f"{call.name} gives a {type(leaf).__name__}")
            if not isinstance(call.target, ModuleCall) and call.name != "_detect_is_causal_mask":
                raise self._block(
                    f"{call.name.strip('_')}() takes a {type(leaf).__name__} out of a tensor, so what "
                    f"follows depends on the tensor's values"
                )

    # -- decisions, places, refusals ----------------------------------------------------------------

    def decided(self, expression: Expression, answer: Number) -> None:
        """Python asked what ``expression`` is."""
        if not self._is_watching() or (expression, answer) in self._decisions:
            return
        self._decisions.add((expression, answer))
        decision = Decision(expression, answer)
        self.calls.append(
            Call(decision, expression_of(expression), self._stack, self._place(), _context())
        )

    def _place(self) -> Place:
        frame = sys._getframe(1)
        first: Any = None
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith(_PACKAGES):
                return Place(name, frame.f_lineno, frame.f_code.co_name)
            if first is None and not name.startswith(_PACKAGES[1]):
                first = frame
            frame = frame.f_back  # type: ignore[assignment]
        frame = first or sys._getframe(1)
        return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)

    def _block(self, reason: str, *, final: bool = False) -> Blocked:
        self.blocked = Blocked(reason, self._stack, self._place(), final=final)
        return self.blocked


def _context() -> Context:
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    )
    return Context(torch.is_grad_enabled(), autocast)


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none of their own
        return id(tensor)


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.layout == torch.strided else tensor.clone()
