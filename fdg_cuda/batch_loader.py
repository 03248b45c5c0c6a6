"""A loader of reproducible batches, made in this process or ahead by others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fdg_cuda.loader_workers import Place, WorkerTeam

if TYPE_CHECKING:
    from fdg_cuda.data import ImageTensors

ImageBatch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class BatchLoader:
    """Batches of ``dataset`` as float32 ``(B, C, H, W)`` and int64 ``(B,)``, anew at each ``iter``.

    What batch b of epoch e holds, order and augmentation both, depends on ``(seed, e, b)`` alone: not
    on ``workers``, nor on which of them makes it. ``epoch`` is the number of the next epoch: it counts
    the calls of ``iter`` from 0 and may be set to resume a run. Without ``shuffle`` samples come in
    their own order. The last batch holds what is left unless ``drop_last``.

    ``workers`` processes make batches ahead, two each; with 0 each batch is made when it is asked for,
    in this process. They are started by the first pass and stay for the next until ``close``, the end
    of a ``with`` block, or the loader's own end; a pass that is not read to its end ends them too.
    ``pin_memory`` puts what they made into page-locked memory, in a thread beside them.

    Raises ValueError for a batch size below 1, a negative seed or number of workers, ``pin_memory``
    without workers, or if there would be no batch.
    """

    dataset: ImageTensors
    batch_size: int
    _: KW_ONLY
    shuffle: bool = False
    seed: int = 0
    drop_last: bool = False
    channels_last: bool = False
    workers: int = 0
    pin_memory: bool = False
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}.")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, got {self.workers}.")
        if self.pin_memory and not self.workers:
            raise ValueError(
                "pin_memory is done beside the workers, and there are none: give workers=1 or more, or "
                "leave it out (fit and evaluate bring batches to CUDA devices through page-locked "
                "memory in any case)."
            )
        if not len(self):
            raise ValueError(
                f"drop_last would leave no batch: batch_size is {self.batch_size}, the data set "
                f"has {len(self.dataset)} samples. Choose a smaller batch_size."
            )
        self._batches = _Batches(
            self.dataset, self.batch_size, self.shuffle, self.seed, self.channels_last
        )
        self._idle: list[WorkerTeam] = []

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[ImageBatch]:
        """What ``iter`` gives from the 0-based ``batch`` on; those before it are not made.

        Raises ValueError if the epoch has not as many batches.
        """
        if not 0 <= batch <= len(self):
            raise ValueError(f"an epoch has {len(self)} batches; it cannot begin behind {batch}")
        # Not itself a generator: the epoch must count from here, not from the first batch.
        self.epoch += 1
        places = [(self.epoch - 1, number) for number in range(batch, len(self))]
        return self._by_workers(places) if self.workers else map(self._batches.__getitem__, places)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: which epoch comes next."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.epoch = state["epoch"]

    def close(self) -> None:
        """End the workers that wait for a next pass, which would start them anew."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _by_workers(self, places: list[Place]) -> Iterator[ImageBatch]:
        team = self._team()
        finished = False
        try:
            yield from team.run(places)
            finished = True
        finally:
            # What is still being made for an abandoned pass, or lost with a worker, is nobody's.
            if finished:
                self._idle.append(team)
            else:
                team.close()

    def _team(self) -> WorkerTeam:
        while self._idle:
            team = self._idle.pop()
            if team.whole:
                return team
            team.close()
        return WorkerTeam(self._batches, self.workers, pin_memory=self.pin_memory)


class _Batches(Dataset[ImageBatch]):
    """The batch at a :data:`Place`, the same wherever and in whatever order batches are made."""

    def __init__(
        self, dataset: ImageTensors, batch_size: int, shuffle: bool, seed: int, channels_last: bool
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._order: tuple[int, Tensor] | None = None  # of the epoch asked for last

    def __getitem__(self, place: Place) -> ImageBatch:
        epoch, number = place
        begin = number * self._batch_size
        index = self._order_of(epoch)[begin : begin + self._batch_size]
        x, y = self._dataset.batch(index, self._generator(epoch, number))
        return x.contiguous(memory_format=self._layout), y

    def _order_of(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            count = len(self._dataset)
            order = torch.arange(count)
            if self._shuffle:
                order = torch.randperm(count, generator=self._generator(epoch))
            self._order = epoch, order
        return self._order[1]

    def _generator(self, epoch: int, *batch: int) -> torch.Generator:
        # A plain seed + epoch would give seed 1 the epochs of seed 0, one late. And as a third number
        # beside them batch 0 would give the epoch's own generator: numbers of nothing are 0s.
        mixed = np.random.SeedSequence((self._seed, epoch), spawn_key=batch)
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
