"""Train one PyTorch model split over several devices with delayed gradients: no stage ever waits.

>>> runner = FDGRunner(model, devices=["cpu", "cpu"])
>>> runner.fit(loader, epochs=4)
"""

from fdg_cuda.errors import AliasedParameterError, NonFiniteLossError
from fdg_cuda.metrics import BatchResult, EpochResult, Evaluation, History
from fdg_cuda.runner import FDGRunner

__version__ = "0.1.0"

__all__ = [
    "AliasedParameterError",
    "BatchResult",
    "EpochResult",
    "Evaluation",
    "FDGRunner",
    "History",
    "NonFiniteLossError",
    "__version__",
]
