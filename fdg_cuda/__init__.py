"""Train one PyTorch model split over several devices with delayed gradients: no stage ever waits.

>>> runner = FDGRunner(model, devices=["cpu", "cpu"])
>>> runner.fit(loader, epochs=4)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdg_cuda.errors import AliasedParameterError, NonFiniteLossError
    from fdg_cuda.metrics import BatchResult, EpochResult, Evaluation, History
    from fdg_cuda.runner import FDGRunner
    from fdg_cuda.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "AliasedParameterError",
    "BatchResult",
    "EpochResult",
    "Evaluation",
    "FDGRunner",
    "History",
    "NonFiniteLossError",
    "Timeline",
    "__version__",
]

# Importing torch takes seconds, which the command line's help should not; so a public name is
# imported from its module when it is first asked for.
_MODULES = {
    "AliasedParameterError": "fdg_cuda.errors",
    "BatchResult": "fdg_cuda.metrics",
    "EpochResult": "fdg_cuda.metrics",
    "Evaluation": "fdg_cuda.metrics",
    "FDGRunner": "fdg_cuda.runner",
    "History": "fdg_cuda.metrics",
    "NonFiniteLossError": "fdg_cuda.errors",
    "Timeline": "fdg_cuda.timeline",
}

if not TYPE_CHECKING:  # type checkers see the imports above, and no others

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
