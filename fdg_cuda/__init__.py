"""Train one PyTorch model split over several devices with delayed gradients: no stage ever waits.

>>> runner = FDGRunner(model, devices=["cpu", "cpu"])
>>> runner.fit(loader, epochs=4)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdg_cuda.callbacks import Callback, FitStart
    from fdg_cuda.checkpoints import Checkpoints
    from fdg_cuda.errors import (
        AliasedParameterError,
        CheckpointError,
        CutMemoryError,
        LoaderWorkerError,
        ModelCaptureError,
        NonFiniteLossError,
        TrainingStopped,
    )
    from fdg_cuda.groups import no_decay_on_norm_and_bias
    from fdg_cuda.metrics import BatchResult, EpochResult, Evaluation, History
    from fdg_cuda.planning import plan
    from fdg_cuda.plans import Plan
    from fdg_cuda.runner import FDGRunner
    from fdg_cuda.shares import Shares
    from fdg_cuda.stage_log import StageLog
    from fdg_cuda.tensorboard import TensorBoard
    from fdg_cuda.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "AliasedParameterError",
    "BatchResult",
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "CutMemoryError",
    "EpochResult",
    "Evaluation",
    "FDGRunner",
    "FitStart",
    "History",
    "LoaderWorkerError",
    "ModelCaptureError",
    "NonFiniteLossError",
    "Plan",
    "Shares",
    "StageLog",
    "TensorBoard",
    "Timeline",
    "TrainingStopped",
    "__version__",
    "no_decay_on_norm_and_bias",
    "plan",
]

# Importing torch takes seconds, which the command line's help should not; so a public name is
# imported from its module when it is first asked for.
_MODULES = {
    "AliasedParameterError": "fdg_cuda.errors",
    "BatchResult": "fdg_cuda.metrics",
    "Callback": "fdg_cuda.callbacks",
    "CheckpointError": "fdg_cuda.errors",
    "Checkpoints": "fdg_cuda.checkpoints",
    "CutMemoryError": "fdg_cuda.errors",
    "EpochResult": "fdg_cuda.metrics",
    "Evaluation": "fdg_cuda.metrics",
    "FDGRunner": "fdg_cuda.runner",
    "FitStart": "fdg_cuda.callbacks",
    "History": "fdg_cuda.metrics",
    "LoaderWorkerError": "fdg_cuda.errors",
    "ModelCaptureError": "fdg_cuda.errors",
    "NonFiniteLossError": "fdg_cuda.errors",
    "Plan": "fdg_cuda.plans",
    "Shares": "fdg_cuda.shares",
    "StageLog": "fdg_cuda.stage_log",
    "TensorBoard": "fdg_cuda.tensorboard",
    "Timeline": "fdg_cuda.timeline",
    "TrainingStopped": "fdg_cuda.errors",
    "no_decay_on_norm_and_bias": "fdg_cuda.groups",
    "plan": "fdg_cuda.planning",
}

if not TYPE_CHECKING:  # type checkers see the imports above, and no others

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        try:
            value = getattr(import_module(_MODULES[name]), name)
        except ImportError as error:
            if "_core" not in str(error):
                raise
            raise ImportError(
                f"fdg_cuda was imported from {__path__[0]}, where its extension is not built ({error}): "
                f"run `pip install .` there, or leave this folder if fdg_cuda is installed elsewhere"
            ) from error
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
