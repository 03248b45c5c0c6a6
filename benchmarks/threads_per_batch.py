"""FDG the way its authors' program runs it: in every tick a thread per stage is started and joined.

Written afresh, as the baseline that :mod:`benchmarks.compare` measures the runner against. Zhuang, Wang,
Liu and Lin, "Fully Decoupled Neural Network Learning Using Delayed Gradients", TNNLS 2022; the numbers
are those of ``backward_weights="current"``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sent = tuple[
    Tensor | None, Tensor | None
]  # the activation for the stage above, the error for the one below


class ThreadsPerBatch:
    """Trains ``stages`` in place, a batch entering with every tick.

    Args:
        stages: each maps a tensor to a tensor; none writes into its input.
        loss_fn: (output, target) to a scalar.
        beta: stages but the last multiply the error signal they receive by it.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        beta: float = 0.5,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        self._stages = list(stages)
        self._last = len(stages) - 1
        self._loss_fn = loss_fn
        self._beta = beta
        # Weights change in place between a batch's forward and its backward, as under PyTorch 1.0:
        # .data has its own version counter, so autograd does not object.
        self._weights = [[p.data for p in stage.parameters()] for stage in stages]
        self._optimizers = [
            torch.optim.SGD(weights, lr=lr, momentum=momentum, weight_decay=weight_decay)
            for weights in self._weights
        ]
        self._in_flight: list[deque[tuple[Tensor, Tensor]]] = [deque() for _ in stages]
        self._targets: deque[Tensor] = deque()
        self._activations: list[Tensor | None] = [None] * len(stages)  # received, by stage
        self._errors: list[Tensor | None] = [None] * len(stages)

    def tick(self, batch: tuple[Tensor, Tensor] | None) -> None:
        """Every stage's work of one tick; ``batch`` enters. None: nothing does."""
        if batch is not None:
            self._activations[0] = batch[0]
            self._targets.append(batch[1])
        sent: list[Sent] = [(None, None)] * len(self._stages)
        failures: list[BaseException] = []

        def work(k: int) -> None:
            try:
                sent[k] = self._work(k, self._activations[k], self._errors[k])
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(self._stages))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        self._activations = [None, *(up for up, _ in sent[:-1])]
        self._errors = [*(down for _, down in sent[1:]), None]

    def drain(self) -> None:
        """Finish the batches that have entered."""
        for _ in range(2 * self._last):
            self.tick(None)

    def _work(self, k: int, activation: Tensor | None, error: Tensor | None) -> Sent:
        up = down = None
        if error is not None:
            x, output = self._in_flight[k].popleft()
            down = self._backward_and_update(k, x, output, self._beta * error)
        if activation is not None:
            x = activation.detach().requires_grad_(k > 0)
            output = self._stages[k](x)
            if k == self._last:
                loss = self._loss_fn(output, self._targets.popleft())
                down = self._backward_and_update(k, x, loss, None)
            else:
                self._in_flight[k].append((x, output))
                up = output.detach()
        return up, down

    def _backward_and_update(
        self, k: int, x: Tensor, root: Tensor, error: Tensor | None
    ) -> Tensor | None:
        torch.autograd.backward(root, error)
        for weight, parameter in zip(self._weights[k], self._stages[k].parameters(), strict=True):
            weight.grad, parameter.grad = parameter.grad, None
        self._optimizers[k].step()
        return x.grad
