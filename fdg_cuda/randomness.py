"""Random numbers of stages that compute side by side on the CPU.

torch has one CPU generator per process. Stages on several threads would take numbers from it in the
order in which the threads happen to run, and another one on every run. So each stage has a generator
of its own, and in :func:`drawing_from` it stands for torch's in the thread it is called on:

- Every operator that takes a generator and got none gets the stage's. A kernel for the dispatch key
  ``BackendSelect``, which lies below autograd and above the devices' own kernels, sees to that; what
  is composed of others (dropout, ``torch.rand``) arrives there as the operators it is composed of.
  Operators that draw nothing do not come here.
- ``torch.get_rng_state``, ``set_rng_state``, ``manual_seed``, ``torch.random.fork_rng`` and thereby
  ``torch.utils.checkpoint``, whose second forward draws what its first one drew, mean the stage's.

Not reached: Python's ``random``, numpy, extensions that ask torch's C++ for its generator, and threads
that a layer starts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import DispatchKey

RandomState = tuple[Tensor, ...]  # one per generator


class _Here(threading.local):
    generator: torch.Generator | None = None


_here = _Here()
_lock = threading.Lock()
_library: torch.library.Library | None = None
_rerouted = 0  # how many called reroute_generator and not yet restore_generator


def seed_stage(generator: torch.Generator, seed: int, stage: int) -> None:
    """Seed ``generator`` from the user's seed and the stage's number."""
    words = np.random.SeedSequence([seed, stage]).generate_state(1, np.uint64)
    generator.manual_seed(int(words[0]))


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """In this thread ``generator`` stands for torch's; between :func:`reroute_generator` and
    :func:`restore_generator`."""
    before = _here.generator
    _here.generator = generator
    try:
        yield
    finally:
        _here.generator = before


def reroute_generator() -> None:
    """Make :func:`drawing_from` possible; called as often as :func:`restore_generator` will be."""
    global _library, _rerouted
    with _lock:
        # For good: other threads may be about to call a kernel that is taken back.
        if _library is None:
            _library = _register()
        _rerouted += 1
        torch.random.default_generator = _GeneratorOfThread()  # type: ignore[attr-defined, assignment]


def restore_generator() -> None:
    """See :func:`reroute_generator`."""
    global _rerouted
    with _lock:
        _rerouted -= 1
        if not _rerouted:
            torch.random.default_generator = torch.default_generator  # type: ignore[attr-defined]


class _GeneratorOfThread:
    """For ``torch.random``, whose functions look the generator up in their module."""

    def __getattr__(self, name: str) -> Any:
        generator = _here.generator
        return getattr(torch.default_generator if generator is None else generator, name)


def drawing_operators() -> list[str]:
    """Names, with overload, of torch's operators that draw from a generator in a CPU kernel."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(
        name
        for name in names
        if name.startswith("aten::")
        and any(argument.name == "generator" for argument in _operator(name)._schema.arguments)
    )


def _operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    operator: torch._ops.OpOverload = getattr(
        getattr(torch.ops.aten, packet), overload or "default"
    )
    return operator


def _register() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in drawing_operators():
        kernel = _kernel(_operator(name))
        library.impl(name, kernel, "BackendSelect", with_keyset=True)  # type: ignore[no-untyped-call]
    return library


def _kernel(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """``operator`` with this thread's generator, where none was given and the numbers are made on
    the CPU."""
    below = torch._C._dispatch_keyset_full_after(DispatchKey.BackendSelect)
    names = [argument.name for argument in operator._schema.arguments]
    position = names.index("generator")

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        generator = _here.generator
        if generator is not None and keyset.has(DispatchKey.CPU):
            if len(args) > position:
                if args[position] is None:
                    args = (*args[:position], generator, *args[position + 1 :])
            elif kwargs.get("generator") is None:
                kwargs["generator"] = generator
        return operator.redispatch(keyset & below, *args, **kwargs)

    return kernel
