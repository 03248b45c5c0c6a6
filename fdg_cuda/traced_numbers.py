"""Numbers that remember how they came from the sizes of tensors.

While a model is recorded (:mod:`fdg_cuda.recording`), ``x.shape`` holds :class:`TracedInt`. They are
ints, so that the model's code takes them for what they are, and arithmetic on them keeps account of
itself; where Python wants to know what such a number *is* (a comparison, ``hash``, ``int``), the
answer is noted as a decision, which must come out the same for every later batch.

What C code takes out of an int without asking (``range(n)``, ``[0] * n``, ``0.5 * n``) cannot be seen
here. :mod:`fdg_cuda.capture` finds it by recording the model with other sizes too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

Number = Union[int, float]  # noqa: UP007 (evaluated at run time by nobody, but Python 3.10 aliases)


@dataclass(frozen=True)
class SizeOf:
    """Dimension ``dim`` of the tensor with number ``value``."""

    value: int
    dim: int


@dataclass(frozen=True)
class Computed:
    """``OPERATIONS[operation]`` of ``operands``, each a number or again one of these."""

    operation: str
    operands: tuple[Any, ...]


Expression = Union[SizeOf, Computed]  # noqa: UP007
# Told of a decision: what was asked, and the answer.
Decided = Callable[[Expression, Number], None]

_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY: dict[str, Callable[[Any], Number]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}
_CONVERSIONS: dict[str, Callable[[Any], Number]] = {"bool": bool, "int": int, "float": float}
OPERATIONS: dict[str, Callable[..., Number]] = {
    **{name: getattr(operator, name) for name in (*_ARITHMETIC, *_COMPARISONS)},
    **_UNARY,
    **_CONVERSIONS,
    "round": round,
}


class TracedInt(int):
    """An int that came from sizes by way of ``expression``."""

    expression: Expression
    decided: Decided

    def __hash__(self) -> int:
        value = plain(self)
        self.decided(self.expression, value)
        return hash(value)

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None else round(plain(self), digits)


class TracedFloat(float):
    """A float that came from sizes by way of ``expression``."""

    expression: Expression
    decided: Decided

    def __hash__(self) -> int:
        value = plain(self)
        self.decided(self.expression, value)
        return hash(value)

    def __round__(self, digits: Any = None) -> Any:
        operands = (self,) if digits is None else (self, digits)
        return _computed(self, "round", operands)


def traced(value: Number, expression: Expression, decided: Decided) -> Any:
    """``value`` as a number that came from sizes."""
    number: Any = (TracedInt if isinstance(value, int) else TracedFloat)(value)
    number.expression, number.decided = expression, decided
    return number


def plain(value: Any) -> Any:
    """``value`` without its history, if it has one."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


def expression_of(value: Any) -> Any:
    """How ``value`` came about; a number without history stands for itself."""
    return value.expression if isinstance(value, (TracedInt, TracedFloat)) else value


def sizes_in(expression: Any) -> set[SizeOf]:
    """The sizes ``expression`` is computed from."""
    if isinstance(expression, SizeOf):
        return {expression}
    if isinstance(expression, Computed):
        return set().union(*map(sizes_in, expression.operands))
    return set()


def _computed(owner: Any, name: str, operands: tuple[Any, ...]) -> Any:
    value = OPERATIONS[name](*map(plain, operands))
    if not isinstance(value, (int, float)):
        return value  # a complex power
    expression = Computed(name, tuple(map(expression_of, operands)))
    return traced(value, expression, owner.decided)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float, bool, TracedInt, TracedFloat)


def _arithmetic(name: str, *, reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any, *modulus: Any) -> Any:
        if not _is_number(other) or modulus:
            return NotImplemented
        return _computed(self, name, (other, self) if reflected else (self, other))

    return method


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not _is_number(other):
            return NotImplemented
        answer = _computed(self, name, (self, other))
        self.decided(answer.expression, bool(plain(answer)))
        return bool(plain(answer))

    return method


def _unary(name: str) -> Callable[[Any], Any]:
    return lambda self: _computed(self, name, (self,))


def _conversion(name: str) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        value = OPERATIONS[name](plain(self))
        self.decided(Computed(name, (self.expression,)), value)
        return value

    return method


for _class in (TracedInt, TracedFloat):
    for _name in _ARITHMETIC:
        setattr(_class, f"__{_name}__", _arithmetic(_name, reflected=False))
        setattr(_class, f"__r{_name}__", _arithmetic(_name, reflected=True))
    for _name in _COMPARISONS:
        setattr(_class, f"__{_name}__", _comparison(_name))
    for _name in _UNARY:
        setattr(_class, f"__{_name}__", _unary(_name))
    for _name in _CONVERSIONS:
        setattr(_class, f"__{_name}__", _conversion(_name))
