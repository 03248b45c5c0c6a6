"""Parameter groups: which parameters have hyper-parameters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

Overrides = Mapping[str, Any]
GroupRule = Callable[[str, Tensor], Overrides | None] | Mapping[str, Overrides]


def no_decay_on_norm_and_bias(name: str, parameter: Tensor) -> dict[str, Any] | None:
    """For ``FDGRunner(..., param_groups=...)``: no weight decay where a parameter has at most one
    dimension, as biases and the scales and shifts of normalisation layers have."""
    return {"weight_decay": 0.0} if parameter.ndim <= 1 else None


def no_decay(model: nn.Module, which: Sequence[str]) -> GroupRule:
    """No weight decay for some parameters of ``model``, as a rule for ``param_groups``.

    Args:
        which: patterns of names, as in the shell, and two words: ``norm``, the parameters of
            normalisation layers (modules with ``Norm`` in the name of their class), and ``bias``,
            everything called so. The words may find nothing.

    Raises:
        ValueError: a pattern, or all of them together, finds nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in which:
        if pattern == "norm":
            chosen |= _norm_parameters(model)
        elif pattern == "bias":
            chosen |= {name for name in names if name.split(".")[-1] == "bias"}
        else:
            _check_pattern(pattern, names)
            chosen |= {name for name in names if fnmatchcase(name, pattern)}
    if not chosen:
        raise ValueError(f"{' and '.join(which)}: no parameter of the model is one; {_some(names)}")
    return lambda name, parameter: {"weight_decay": 0.0} if name in chosen else None


def _norm_parameters(model: nn.Module) -> set[str]:
    return {
        f"{layer}.{name}" if layer else name
        for layer, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }


def _check_pattern(pattern: str, names: Sequence[str], where: str = "") -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise ValueError(f"{where}the pattern {pattern!r} matches no parameter; {_some(names)}")


def _some(names: Sequence[str]) -> str:
    return f"the model's are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"


class ParameterGroups:
    """The groups of a model, in order; the first one is the default and overrides nothing.

    Args:
        rule: ``(name, parameter) -> overrides or None``; parameters with equal overrides form a group.
            Or a mapping from patterns of names (as in the shell: ``"*.bias"``) to overrides, of which
            the first pattern that matches counts. None: there is one group.
        named: all parameters of the model, with their names.

    Raises:
        TypeError: the rule, or what it gives, is of another kind.
        ValueError: a pattern matches nothing.
    """

    def __init__(self, rule: GroupRule | None, named: Iterable[tuple[str, Tensor]]) -> None:
        if rule is not None and not callable(rule) and not isinstance(rule, Mapping):
            raise TypeError(
                f"param_groups must be a function (name, parameter) -> dict or None, or a mapping "
                f"from patterns of parameter names to dicts; got a {type(rule).__name__}"
            )
        self._rule = rule
        self.overrides: list[Overrides] = [{}]
        self._groups: dict[str, int] = {}
        parameters = list(named)
        if isinstance(rule, Mapping):
            for pattern in rule:
                _check_pattern(pattern, [name for name, _ in parameters], "param_groups: ")
            for pattern, overrides in rule.items():
                self._add(self._checked(overrides, f"the pattern {pattern!r}"))
        for name, parameter in parameters:
            overrides = self._overrides_of(name, parameter)
            self._add(overrides)
            self._groups[name] = self.overrides.index(overrides)

    def check_keys(self, known: Iterable[str]) -> None:
        """``known``: the hyper-parameters that can be overridden.

        Raises:
            ValueError: a group overrides another one.
        """
        names = list(known)
        for key in (key for overrides in self.overrides for key in overrides):
            if key not in names:
                raise ValueError(
                    f"param_groups overrides {key!r}, but the hyper-parameters are {', '.join(names)}"
                )

    def divide(self, numbers: Iterable[int], tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
        """``tensors``, each in the group of its number, as torch optimizers take groups."""
        divided: list[dict[str, Any]] = [{"params": [], **each} for each in self.overrides]
        for number, tensor in zip(numbers, tensors, strict=True):
            divided[number]["params"].append(tensor)
        return divided

    @property
    def given(self) -> bool:
        """Whether the caller asked for groups."""
        return self._rule is not None

    def of(self, name: str, parameter: Tensor) -> int:
        """The number of the group that the parameter called ``name`` is in.

        Raises:
            ValueError: it is new to the model, and no group has the overrides it should have.
        """
        if name not in self._groups:
            overrides = self._overrides_of(name, parameter)
            if overrides not in self.overrides:
                raise ValueError(
                    f"parameter {name} is new, and param_groups gives it {dict(overrides)}, which no "
                    f"parameter had when the runner was made; make a new runner"
                )
            self._groups[name] = self.overrides.index(overrides)
        return self._groups[name]

    def _add(self, overrides: Overrides) -> None:
        if overrides not in self.overrides:
            self.overrides.append(overrides)

    def _overrides_of(self, name: str, parameter: Tensor) -> Overrides:
        if self._rule is None:
            return {}
        if isinstance(self._rule, Mapping):
            matching = (o for pattern, o in self._rule.items() if fnmatchcase(name, pattern))
            overrides = next(matching, None)
        else:
            overrides = self._rule(name, parameter)
        return {} if overrides is None else self._checked(overrides, f"parameter {name}")

    def _checked(self, overrides: Any, what: str) -> Overrides:
        if not isinstance(overrides, Mapping):
            raise TypeError(
                f"param_groups must give dicts such as {{'weight_decay': 0.0}}, or a function None; "
                f"for {what} it gives {overrides!r}"
            )
        return dict(overrides)
