"""Whether two recorded forwards of a model are the same, and which module makes the difference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.utils import _pytree as pytree

from fdg_cuda.nested import PLAIN
from fdg_cuda.trace import ByMode, Call, Decision, Place, Template, Trace
from fdg_cuda.traced_numbers import Computed, SizeOf


@dataclass(frozen=True)
class Difference:
    """Where two forwards part: in the code of the module at the end of ``stack``."""

    stack: tuple[str, ...]
    place: Place | None


def merged(training: Trace, evaluation: Trace) -> Trace | list[Difference]:
    """One trace for both modes: plain arguments that differ are chosen by the mode of the module in
    whose forward they are given (``F.dropout(x, training=self.training)``)."""
    parted = _shape_differs(training, evaluation)
    if parted:
        return parted
    calls = []
    for one, other in zip(training.calls, evaluation.calls, strict=True):
        template = _merged_template(one.template, other.template, one.stack[-1])
        outputs = _merged_template(one.outputs, other.outputs, None)
        if (
            template is None
            or outputs is None
            or one.spec != other.spec
            or one.context != other.context
            or (isinstance(one.target, Decision) and one.target != other.target)
        ):
            parted.append(Difference(one.stack, one.place))
            continue
        calls.append(
            replace(
                one,
                template=template[0],
                mutates=one.mutates | other.mutates,
                changes=one.changes | other.changes,
                works=one.works or other.works,
            )
        )
    if _merged_template(training.output, evaluation.output, None) is None:
        parted.append(Difference(("",), None))
    if parted:
        return parted
    return replace(training, calls=calls)


def differences(one: Trace, other: Trace) -> list[Difference]:
    """Where two forwards in the same mode, on inputs of different sizes, part."""
    parted = _shape_differs(one, other)
    if parted:
        return parted
    for a, b in zip(one.calls, other.calls, strict=True):
        if (
            _merged_template(a.template, b.template, None) is None
            or _merged_template(a.outputs, b.outputs, None) is None
            or a.spec != b.spec
            or (isinstance(a.target, Decision) and a.target != b.target)
        ):
            parted.append(Difference(a.stack, a.place))
    if _merged_template(one.output, other.output, None) is None:
        parted.append(Difference(("",), None))
    return parted


# -- the calls, one by one --------------------------------------------------------------------------


def _shape_differs(one: Trace, other: Trace) -> list[Difference]:
    """The modules whose own forwards, rather than those of others inside them, make other calls."""
    entries, others = _entries(one), _entries(other)
    found: list[Difference] = []
    for a, b in zip(entries, others, strict=False):
        if a.stack != b.stack:  # from here on another module is run
            return [*found, Difference(_common(a.stack, b.stack), _place(a.calls, b.calls))]
        if a.own != b.own:
            found.append(Difference(a.stack, _place(a.calls, b.calls)))
    if not found and (len(entries) != len(others) or len(one.calls) != len(other.calls)):
        found.append(Difference(("",), None))
    return found


@dataclass(frozen=True)
class _Entry:
    """One run of a module's forward."""

    stack: tuple[str, ...]
    own: list[Any]  # in order: what it calls itself, and the modules it enters
    calls: list[Call]


def _entries(trace: Trace) -> list[_Entry]:
    """Innermost first: a module's forward ends before that of the one around it."""
    entries = []
    for stack, begin, end in trace.visits:
        own: list[Any] = []
        calls = trace.calls[begin:end]
        for call in calls:
            if len(call.stack) == len(stack):
                own.append("decision" if isinstance(call.target, Decision) else call.target)
        inside = [v for v in trace.visits if len(v[0]) == len(stack) + 1 and v[0][:-1] == stack]
        own.append([v[0] for v in inside if begin <= v[1] and v[2] <= end])
        entries.append(_Entry(stack, own, calls))
    return entries


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length] or ("",)


def _place(one: list[Call], other: list[Call]) -> Place | None:
    for a, b in zip(one, other, strict=False):
        if not a.same_kind(b):
            return a.place
    longer = max(one, other, key=len)
    shorter = min(len(one), len(other))
    return longer[shorter].place if len(longer) > shorter else None


def _merged_template(one: Template, other: Template, owner: str | None) -> tuple[Any] | None:
    """Both in one, as a 1-tuple; None if they differ in more than plain values, or at all without
    an owner to choose by."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    if spec != other_spec:
        return None
    result = []
    for a, b in zip(leaves, others, strict=True):
        if type(a) is type(b) and _equal(a, b):
            result.append(a)
        elif owner is not None and isinstance(a, PLAIN) and isinstance(b, PLAIN):
            result.append(ByMode(owner, a, b))
        else:
            return None
    return (pytree.tree_unflatten(result, spec),)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (SizeOf, Computed)):
        return bool(a == b)
    return a is b or bool(a == b) or (a != a and b != b)
