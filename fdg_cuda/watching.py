"""What torch's function modes do not show is watched by replacing it for a while: calls of modules, of
autograd functions, and ``len``. And what modules set on themselves meanwhile is seen and undone."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer


@contextmanager
def watched(
    is_watching: Callable[[], bool],
    on_module: Callable[[nn.Module, Callable[..., Any], Any, dict[str, Any]], Any],
    on_function: Callable[[Callable[..., Any], Any, dict[str, Any]], Any],
) -> Iterator[None]:
    """Modules and functions are handed to the one who watches.

    Args:
        is_watching: asked before; where it says no (in other threads, say) all is as ever.
        on_module: gets the module, torch's own ``nn.Module.__call__``, and the arguments.
        on_function: gets the function and the arguments.
    """
    measure = builtins.len
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    causal = transformer._detect_is_causal_mask

    def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_watching():
            return call(module, *args, **kwargs)
        return on_module(module, call, args, kwargs)

    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        original = MethodType(apply.__func__, cls)
        return on_function(original, args, kwargs) if is_watching() else original(*args, **kwargs)

    def detect_causal(*args: Any, **kwargs: Any) -> Any:
        # A look at the mask's values that chooses the kernel: asked again for every batch.
        return on_function(causal, args, kwargs) if is_watching() else causal(*args, **kwargs)

    def length(value: Any, /) -> int:
        # What len() returns Python makes a plain int, whatever __len__ gave.
        if type(value) is Tensor and value.ndim > 0 and is_watching():
            return value.shape[0]
        return measure(value)

    nn.Module.__call__ = module_call  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(function_apply)  # type: ignore[assignment]
    transformer._detect_is_causal_mask = detect_causal
    builtins.len = length
    try:
        yield
    finally:
        builtins.len = measure
        nn.Module.__call__ = call  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        transformer._detect_is_causal_mask = causal


class Attributes:
    """The attributes and buffers that ``model``'s modules have now."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]

    def changed(self) -> Iterator[tuple[nn.Module, str]]:
        """Those that are others than they were."""
        for module, attributes, buffers in self._before:
            for now, then in ((module.__dict__, attributes), (module._buffers, buffers)):
                for key in {**now, **then}:
                    if key not in now or key not in then or now[key] is not then[key]:
                        yield module, key

    def restore(self) -> None:
        """Put back what they were."""
        for module, attributes, buffers in self._before:
            for key in [key for key in module.__dict__ if key not in attributes]:
                del module.__dict__[key]
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
