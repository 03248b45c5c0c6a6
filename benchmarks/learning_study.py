"""What ``benchmarks.learning`` trains: net, data, ways, and one run of each kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import largest_lr
from benchmarks.learning_runs import BP, Way, train
from fdg_cuda import FDGRunner, lr_schedule, models
from fdg_cuda.data import BatchLoader, DataSpec, ImageTensors, load
from fdg_cuda.errors import NonFiniteLossError

TEST_BATCH_SIZE = 1000
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Study:
    """Everything that decides the figures of a run, but for its way and seed.

    Attributes:
        data: of :mod:`fdg_cuda.data`, pooled to half its height and width.
        images: of the training set, the first so many; the test set is whole.
        model_depth: of the ResNet for small images.
        most_stages: K goes from 2 to this.
        probe_updates: of each try of a learning rate.
    """

    data: str = "fashion-mnist"
    images: int = 10_000
    model_depth: int = 14
    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.1
    most_stages: int = 4
    probe_updates: int = 400

    @property
    def ways(self) -> list[Way]:
        kinds = [("fdg", 1.0), ("fdg", 0.5), ("ddg", 1.0)]
        stages = range(2, self.most_stages + 1)
        return [BP, *(Way(method, k, beta) for method, beta in kinds for k in stages)]

    def train(self, way: Way, seed: int, root: Path | None = None) -> dict[str, Any]:
        """One run. Its first weights and its batches depend on ``seed`` alone."""
        spec = halved(self.data, self.images, root)
        test = list(BatchLoader(spec.test, TEST_BATCH_SIZE, channels_last=True))
        with one_thread():
            runner = self._runner(spec, way, seed, self.lr)
            run = train(runner, self._loader(spec, seed), test, self.epochs)
        return {"way": way.name, "seed": seed, **run}

    def search_lr(self, way: Way, root: Path | None = None) -> dict[str, Any]:
        """The largest stable learning rate, with seed 0; see :mod:`benchmarks.largest_lr`."""
        spec = halved(self.data, self.images, root)

        def losses_with(lr: float) -> list[float] | None:
            runner = self._runner(spec, way, 0, lr)
            schedule = lr_schedule.warmup_milestones(
                runner.optimizer, warmup=self.probe_updates // largest_lr.PART
            )
            epochs = itertools.repeat(self._loader(spec, 0))
            batches = itertools.islice(itertools.chain.from_iterable(epochs), self.probe_updates)
            try:
                return runner.fit(batches, lr_scheduler=schedule, lr_step="batch").batch_losses
            except NonFiniteLossError:
                return None

        with one_thread():
            return {"way": way.name, **largest_lr.search(losses_with, spec.num_classes)}

    def _runner(self, spec: DataSpec, way: Way, seed: int, lr: float) -> FDGRunner:
        torch.manual_seed(seed)
        net = models.cifar_resnet(
            self.model_depth, in_channels=spec.in_channels, num_classes=spec.num_classes
        )
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return FDGRunner(
            net,
            ["cpu"] * way.stages,
            method=way.method,
            beta=way.beta,
            split=even_split(len(net), way.stages),
            lr=lr,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            cpu_threads=way.stages,
        )

    def _loader(self, spec: DataSpec, seed: int) -> BatchLoader:
        return BatchLoader(
            spec.train, self.batch_size, shuffle=True, seed=seed, drop_last=True, channels_last=True
        )


def even_split(layers: int, stages: int) -> list[int]:
    """As many layers in each stage, so that a cut does not depend on where it was measured."""
    return [round(stage * layers / stages) for stage in range(1, stages)]


@cache
def halved(name: str, images: int, root: Path | None) -> DataSpec:
    """A data set with the mean of each 2x2 pixels, normalised by the training images that are left.

    Raises:
        ValueError: it has not as many training images.
        FileNotFoundError, ImportError: see :func:`fdg_cuda.data.load`.
    """
    spec = load(name, root, augment=False)
    if not 1 <= images <= len(spec.train):
        raise ValueError(f"{name} has {len(spec.train)} training images; got --images {images}")
    train, test = _pooled(spec.train.images[:images]), _pooled(spec.test.images)
    scale = spec.train.scale
    channels = train.double().div_(scale).transpose(0, 1).flatten(1)
    pixels = list(zip(channels.mean(1).tolist(), channels.std(1).tolist(), strict=True))
    return replace(
        spec,
        train=ImageTensors(train, spec.train.labels[:images], pixels=pixels, scale=scale),
        test=ImageTensors(test, spec.test.labels, pixels=pixels, scale=scale),
        image_size=train.shape[-1],
    )


def _pooled(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float(), 2).round_().to(torch.uint8)


@contextmanager
def one_thread() -> Iterator[None]:
    """For each stage, and so the same bits on machines of any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
