"""The hyper-parameters of the batches in flight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fdg_cuda.loss_scale import BatchScales
from fdg_cuda.optim import FIRST_SHRINK, DelayedOptimizer


class HyperTable:
    """Each batch's hyper-parameters, as they were when it entered.

    Args:
        optimizer: where they are read.
        rows: batches in flight at once, at most.
        shrinks: per stage, how often beta multiplies its gradients.
        scales: what losses are multiplied by; None: they are not.

    Attributes:
        table: float64 (rows, groups, FIRST_SHRINK + stages): what native updates read.
    """

    def __init__(
        self,
        optimizer: DelayedOptimizer,
        rows: int,
        shrinks: Sequence[int],
        scales: BatchScales | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scales = scales
        self._shrinks = list(shrinks)
        self._values: list[list[dict[str, Any]]] = [[] for _ in range(rows)]
        self.table = np.zeros((rows, len(optimizer.param_groups), FIRST_SHRINK + len(shrinks)))

    def enter(self, batch: int) -> None:
        """Keep what is in force now for ``batch``.

        Raises:
            TypeError, ValueError: a value was set that cannot be.
        """
        row = batch % len(self.table)
        self.table[row] = self.optimizer.hyper_row(self._shrinks)
        self._values[row] = self.optimizer.values()
        if self.scales is not None:
            self.scales.enter(batch)

    def shrinks(self, batch: int, stage: int) -> list[float]:
        """The factor of the gradients of ``batch`` at ``stage``, per parameter group."""
        factors: list[float] = self.table[batch % len(self.table), :, FIRST_SHRINK + stage].tolist()
        return factors

    def values(self, batch: int) -> list[dict[str, Any]]:
        """What the update of ``batch`` by a torch optimizer takes, per parameter group."""
        return self._values[batch % len(self.table)]
