"""A stage's trainable parameters as flat memory, with one copy of the weights per slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fdg_cuda._core import FlatSgd

ALIGNMENT_BYTES = 64
# Of weights, from which on several threads share an update. Less is done as soon as they have met, the
# more so where they sleep.
SHARED_FROM_BYTES = 400_000
DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class FlatMemory:
    """The weights (``copies`` of them), momentum and gradient table of one stage.

    Every parameter keeps its shape and strides (channels_last included); copies are views into flat
    arrays that the fused update goes through in one pass. Between runs the caller's own parameters
    *are* views of the newest copy, so nothing is held twice.

    Args:
        parameters: distinct, trainable, all of one dtype (float32 or float64).
        copies: weight copies, at least 1.
        stage: for error messages and the stage's column of the hyper-parameter table.
        device: where the flat memory lies.
        gradient_rows: how many batches' gradients may be in use at once.

    Raises:
        TypeError: a dtype the update cannot train.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        copies: int,
        stage: int,
        device: torch.device | None = None,
        gradient_rows: int = 1,
    ) -> None:
        self.parameters = list(parameters)
        self.stage = stage
        self.dtype = _common_dtype(self.parameters, stage)
        self.segments: list[tuple[int, int]] = []
        end = 0
        for parameter in self.parameters:
            self.segments.append((end, parameter.numel()))
            end += padded_bytes(parameter) // self.dtype.itemsize
        self.weights = [torch.zeros(end, dtype=self.dtype, device=device) for _ in range(copies)]
        self._momentum: Tensor | None = None
        self._strides = [_dense_strides(parameter) for parameter in self.parameters]
        # Leaves of the autograd graphs, one set per weight copy.
        self.leaves = [
            [nn.Parameter(view) for view in self.views(weights)] for weights in self.weights
        ]
        self.gradient_table = np.zeros((gradient_rows, len(self.parameters)), dtype=np.uint64)
        self._gradients: list[Tensor | None] = []
        self._progress = np.zeros(2, dtype=np.int64)
        self.adopt()

    @property
    def momentum(self) -> Tensor:
        """The flat momentum of the fused update; there is none before it is first asked for."""
        if self._momentum is None:
            self._momentum = torch.zeros_like(self.weights[0])
        return self._momentum

    @property
    def has_momentum(self) -> bool:
        """Whether anybody asked for the momentum yet."""
        return self._momentum is not None

    @property
    def newest(self) -> int:
        """The weight copy the last update (or fill) wrote."""
        return int(self._progress[0])

    @property
    def newest_weights(self) -> Tensor:
        """The flat weights the last update wrote."""
        return self.weights[self.newest]

    @property
    def updates(self) -> int:
        """Updates made since the memory was laid out."""
        return int(self._progress[1])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight copies together."""
        return sum(copy.nbytes for copy in self.weights)

    def matches(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether this memory was laid out for just these parameters as they are now."""
        return len(parameters) == len(self.parameters) and all(
            new is old
            and new.shape == leaf.shape
            and new.dtype == leaf.dtype
            and _dense_strides(new) == leaf.stride()
            for new, old, leaf in zip(parameters, self.parameters, self.leaves[0], strict=True)
        )

    def adopt(self) -> None:
        """Take the caller's parameters as the newest weights, if they are not already."""
        with torch.no_grad():
            for parameter, view in zip(
                self.parameters, self.views(self.newest_weights), strict=True
            ):
                if parameter.data_ptr() != view.data_ptr() or parameter.stride() != view.stride():
                    view.copy_(parameter)

    def publish(self) -> None:
        """Make the caller's parameters views of the newest weights."""
        for parameter, view in zip(self.parameters, self.views(self.newest_weights), strict=True):
            parameter.data = view

    def make_newest(self, copy: int) -> None:
        """Put the newest weights into weight copy ``copy``. Only while nothing is running."""
        if copy != self.newest:
            self.weights[copy].copy_(self.newest_weights)
            self._progress[0] = copy

    def copy_weights(self, source: int, target: int) -> None:
        """Put the newest weights, which are in copy ``source``, into ``target``, where a stage's
        work is enqueued or run."""
        if source != target:
            self.weights[target].copy_(self.weights[source])
        self._progress[0] = target

    def count_update(self) -> None:
        """One more was made, of the newest copy in place."""
        self._progress[1] += 1

    def collect_gradients(self, copy: int, row: int = 0) -> None:
        """Move the gradients from the leaves of ``copy`` to where the update finds them: ``row`` of
        the gradient table.

        Raises:
            TypeError: a sparse gradient.
        """
        leaves = self.leaves[copy]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        # On every tick, hence whole lists at a time.
        present = cast("list[Tensor]", gradients)
        try:
            addresses = list(map(Tensor.data_ptr, present))
            readable = (
                list(map(Tensor.stride, present)) == self._strides
                and not any(map(Tensor.is_neg, present))
                and 0 not in addresses
            )
        except (TypeError, RuntimeError):  # one is None or sparse
            readable = False
        if not readable:
            gradients = [
                None if gradient is None else self.readable(gradient, leaf)
                for gradient, leaf in zip(gradients, leaves, strict=True)
            ]
            addresses = [0 if g is None else g.data_ptr() for g in gradients]
        self.gradient_table[row] = addresses
        self._gradients = gradients

    @property
    def gradients(self) -> list[Tensor | None]:
        """Those of the latest backward, or what was put in their place; None: there is none."""
        return self._gradients

    def take_gradients(self) -> list[Tensor | None]:
        """:attr:`gradients`, which are let go of here."""
        taken, self._gradients = self._gradients, []
        return taken

    def place_gradients(self, gradients: list[Tensor | None], row: int) -> None:
        """Put ``gradients``, each laid out as its parameter, where the update finds them."""
        self.gradient_table[row] = [0 if g is None else g.data_ptr() for g in gradients]
        self._gradients = gradients

    def release_gradients(self) -> None:
        """Let go of all gradients, those of a backward that failed half-way too. Only while nothing
        is running."""
        for leaf in (leaf for leaves in self.leaves for leaf in leaves):
            leaf.grad = None
        self._gradients = []
        self.gradient_table[:] = 0

    def cpu_sgd(
        self,
        hyper: np.ndarray,
        threads: int,
        *,
        groups: Sequence[int] | None = None,
        gain: Tensor | None = None,
    ) -> FlatSgd:
        """The fused update over this memory.

        Args:
            threads: that share it, of the team of whichever thread runs it; where there is little to
                do, none does.
            hyper: float64 (rows, groups, columns), or (rows, columns) if there is one group; see
                ``csrc/flat_parameters.h``.
            groups: the parameter group of each parameter; None: there is one.
            gain: one float64 that gradients are multiplied by, read when the update runs; if it is
                not finite the update is skipped. None: nothing is.

        The memory, ``hyper`` and ``gain`` must outlive the update.
        """
        if self.weights[0].nbytes < SHARED_FROM_BYTES:
            threads = 1
        return FlatSgd(**self.addresses(hyper, groups=groups, gain=gain), threads=threads)

    def addresses(
        self,
        hyper: np.ndarray,
        *,
        groups: Sequence[int] | None = None,
        gain: Tensor | None = None,
    ) -> dict[str, Any]:
        """What a native update has to know of this memory; see :meth:`cpu_sgd`."""
        table = hyper if hyper.ndim == 3 else hyper[:, None]
        group_of = [0] * len(self.parameters) if groups is None else groups
        return {
            "dtype": DTYPES[self.dtype],
            "stage": self.stage,
            "segments": [(*s, group) for s, group in zip(self.segments, group_of, strict=True)],
            "weights": [weights.data_ptr() for weights in self.weights],
            "momentum": self.momentum.data_ptr(),
            "gradients": self.gradient_table.ctypes.data,
            "hyper": (hyper.ctypes.data, *table.shape),
            "gain": 0 if gain is None else gain.data_ptr(),
            "progress": self._progress.ctypes.data,
        }

    def views(self, flat: Tensor) -> list[Tensor]:
        """Every parameter's part of ``flat``, in its own shape and strides."""
        return [
            torch.as_strided(flat, parameter.shape, strides, offset)
            for parameter, strides, (offset, _) in zip(
                self.parameters, self._strides, self.segments, strict=True
            )
        ]

    def readable(self, gradient: Tensor, leaf: Tensor) -> Tensor:
        """``gradient`` as memory the update may read: laid out like ``leaf``, no lazy sign or zero.

        Raises:
            TypeError: a sparse gradient.
        """
        if gradient.layout != torch.strided:
            raise TypeError(
                f"stage {self.stage}: a parameter of shape {tuple(leaf.shape)} got a gradient of "
                f"layout {gradient.layout}; the fused update needs dense ones. Build the layer "
                f"without sparse gradients (nn.Embedding(..., sparse=False))."
            )
        # The stride of a dimension of size 1 means nothing.
        steps = zip(gradient.shape, gradient.stride(), leaf.stride(), strict=True)
        laid_out_alike = all(theirs == ours for size, theirs, ours in steps if size > 1)
        if laid_out_alike and not gradient.is_neg() and not gradient._is_zerotensor():
            return gradient
        return torch.empty_strided(
            leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device
        ).copy_(gradient)


def padded_bytes(parameter: Tensor) -> int:
    """The bytes that ``parameter`` takes in flat memory."""
    return -(-parameter.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _common_dtype(parameters: Sequence[nn.Parameter], stage: int) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in parameters}
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise TypeError(
                f"stage {stage} has {dtype} parameters; the fused update trains float32 and float64 "
                f"weights. Convert the model with model.float()."
            )
    if len(dtypes) > 1:
        raise TypeError(
            f"stage {stage} mixes parameters of {', '.join(sorted(map(str, dtypes)))}; a stage needs "
            f"one dtype. Convert the model with model.float() or model.double(), or cut it where "
            f"the dtype changes."
        )
    return dtypes.pop() if dtypes else torch.float32


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's own strides if its elements fill memory without gap or overlap."""
    # `preserve_format` keeps the strides of exactly those tensors.
    return torch.empty_like(parameter, device="meta").stride()
