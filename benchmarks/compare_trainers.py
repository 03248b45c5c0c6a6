"""The ways of training that live in one process, and what every way is: a :class:`Trainer`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.compare_cases import Case
from benchmarks.cuts import STAGES, Cuts
from benchmarks.steps import HYPER, LossFunction, SteadyRunner, plain_step
from benchmarks.threads_per_batch import ThreadsPerBatch
from fdg_cuda import FDGRunner
from fdg_cuda._core import keep_freed_memory


class Trainer(Protocol):
    """A model in training on one batch, over and over."""

    def seconds_per_step(self, warm_up: int, count: int) -> float:
        """Train ``warm_up`` steps and then ``count`` more, which are timed."""

    def state(self) -> dict[str, Tensor]:
        """What this process has trained of the chain, by the chain's names."""


@dataclass(frozen=True)
class Place:
    """Where a trainer is made.

    Attributes:
        case: what it trains.
        cuts: for those that have stages.
        rank: of this process among the way's.
        meeting: a file that does not exist yet, in which the way's processes find each other.
        channels_last: whether stages in different processes compute convolutions so. All others do.
    """

    case: Case
    cuts: Cuts
    rank: int
    meeting: str
    channels_last: bool = True

    def stages(self, chain: nn.Sequential) -> list[nn.Module]:
        """The chain, cut; parameters keep their names, as the slices keep the children's."""
        return [chain[a:b] for a, b in pairwise([0, *self.cuts.split, len(chain)])]


class Stepwise:
    """A trainer that does one step after the other."""

    def __init__(self, step: Callable[[], object], module: nn.Module) -> None:
        self._step = step
        self._module = module

    def seconds_per_step(self, warm_up: int, count: int) -> float:
        for _ in range(warm_up):
            self._step()
        begin = time.perf_counter()
        for _ in range(count):
            self._step()
        return (time.perf_counter() - begin) / count

    def state(self) -> dict[str, Tensor]:
        return self._module.state_dict()


def bp(place: Place, *, threads: int, keep: bool = False) -> Trainer:
    """Plain torch. ``keep``: its process keeps freed memory as the runner's does."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(threads)
    chain = place.case.chain(channels_last=True)
    batch = place.case.batch(channels_last=True)
    return Stepwise(partial(plain_step, chain, sgd(chain), batch), chain)


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), **HYPER)


class Running:
    """The runner, one core per stage, timed in its steady state."""

    def __init__(self, place: Place, *, method: str) -> None:
        torch.set_num_threads(1)

        def make(loss_fn: LossFunction) -> FDGRunner:
            return FDGRunner(
                place.case.chain(channels_last=True),
                ["cpu"] * STAGES,
                method=method,
                split=place.cuts.inside or place.cuts.split,
                capture=bool(place.cuts.inside),
                cpu_threads=STAGES,
                loss_fn=loss_fn,
                **HYPER,
            )

        self.steady = SteadyRunner(make, place.case.batch(channels_last=True))

    def seconds_per_step(self, warm_up: int, count: int) -> float:
        seconds = self.steady.seconds(warm_up, count)
        return sum(seconds) / count

    def state(self) -> dict[str, Tensor]:
        return self.steady.runner.state_dict()


class Published:
    """FDG as its authors' program runs it. Between turns its pipeline stays full."""

    def __init__(self, place: Place) -> None:
        torch.set_num_threads(1)  # and so in every thread it starts
        self._chain = place.case.chain(channels_last=True)
        self._pipeline = ThreadsPerBatch(place.stages(self._chain), **HYPER)
        batch = place.case.batch(channels_last=True)
        self._stepwise = Stepwise(lambda: self._pipeline.tick(batch), self._chain)

    def seconds_per_step(self, warm_up: int, count: int) -> float:
        return self._stepwise.seconds_per_step(warm_up, count)

    def state(self) -> dict[str, Tensor]:
        self._pipeline.drain()
        return self._stepwise.state()


def torchgpipe(place: Place, *, chunks: int) -> Trainer:
    """The package of this name: micro-batches, a thread per stage, nothing recomputed."""
    gpipe = import_module("torchgpipe").GPipe  # of the extra "bench"; without it this way fails
    torch.set_num_threads(1)
    chain = place.case.chain(channels_last=True)
    balance = [b - a for a, b in pairwise([0, *place.cuts.split, len(chain)])]
    model = gpipe(chain, balance, devices=["cpu"] * STAGES, chunks=chunks, checkpoint="never")
    batch = place.case.batch(channels_last=True)
    return Stepwise(partial(plain_step, model, sgd(model), batch), chain)
