"""How far delayed gradients point from fresh ones: the angle between them during training.

    python -m benchmarks.staleness [--model resnet20] [--batches 240] [--every 10] [--jobs 2]
                                   [--quick --out FOLDER]

The same net, weights, batches and order, trained with ``fdg`` on K = 2 to 8 stages by
:mod:`fdg_cuda.reference`, with ``stash`` and with ``current`` backward weights. When stage k updates
for batch b, the *delayed* gradient is the one it uses; the *fresh* one is BP's of the same batch and
the same parameters at the weights of that moment: those that every stage has when that tick begins.
Stage k updates for batch b in tick b + 2K-2-k, in which stage j updates for batch b + j-k; so
they are stage j's weights behind b + j-k updates. The angle is 0 where nothing is stale, 90 degrees
where the two have nothing to do with each other, above where the update does harm.

For the whole net, each side is all stages' gradients of batch b one behind the other.

beta is 1: shrinking changes the length of a stage's gradient and not its direction; but it gives the
stages of the whole net other weights, and the training another course. BatchNorm takes the statistics
of the batch in both; the fresh pass leaves no trace in buffers.

Where training diverges the angles end. A run that is interrupted leaves what it has in the result file.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.arguments import make_parser, parsed
from benchmarks.harness import quartiles, write
from benchmarks.learning_study import even_split
from benchmarks.side_by_side import side_by_side
from fdg_cuda import data, models, reference
from fdg_cuda.cpu_threads import set_threads_here

MODES = ("stash", "current")
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Study:
    """What is trained, and when it is looked at.

    Attributes:
        batches: trained, in one epoch.
        every: a batch in so many is looked at, once all slots of the longest pipeline are filled.
        pooled: side of the squares of pixels that are averaged.
    """

    model: str = "resnet20"
    data: str = "fashion-mnist"
    batch_size: int = 64
    batches: int = 240
    every: int = 10
    stages: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    lr: float = 0.02
    pooled: int = 2
    seed: int = 0

    def sampled(self) -> list[int]:
        """The batches that are looked at, the same for every K."""
        most = max(self.stages)
        first = -(-2 * most // self.every) * self.every
        return list(range(first, self.batches - most + 1, self.every))


QUICK = Study(
    model="mlp", data="digits", batch_size=8, batches=14, every=2, stages=(2, 3), pooled=1
)


@dataclass
class Course:
    """A stage's newest weights and gradients, as its training went.

    Attributes:
        weights: behind 0, 1, ... updates; each a list of tensors by parameter.
        gradients: of batch 0, 1, ...
    """

    weights: list[list[Tensor]] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)


class RecordedSGD(torch.optim.SGD):
    """Keeps what it gets and what it makes of it in ``course``."""

    def __init__(self, parameters: list[nn.Parameter], course: Course, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self._parameters = parameters
        self._course = course
        course.weights.append(self._weights())

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """As SGD's."""
        gradients = [parameter.grad for parameter in self._parameters]
        self._course.gradients.append([g.clone() for g in gradients if g is not None])
        super().step(closure)
        self._course.weights.append(self._weights())


def train(
    stages: Sequence[nn.Module],
    batches: Sequence[Batch],
    mode: str,
    lr: float,
) -> tuple[list[Course], list[float]]:
    """Train ``stages`` with ``fdg`` and beta 1, in place; what each went through, and the losses."""
    courses: list[Course] = []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        courses.append(Course())
        return RecordedSGD(parameters, courses[-1], lr)

    result = reference.train(
        stages, batches, lr=lr, beta=1.0, backward_weights=mode, optimizer=optimizer
    )
    return courses, result.losses


class Fresh:
    """BP through ``stages`` with weights of any moment. The modules themselves stay as they are."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self._stages = copy.deepcopy(list(stages))
        self._parameters = [list(stage.parameters()) for stage in self._stages]

    def gradients(self, courses: Sequence[Course], batch: Batch, b: int, k: int) -> list[Tensor]:
        """Of stage ``k``'s parameters, for ``batch``, which is number ``b``, at the weights of the
        moment of the stage's update for it."""
        for j, (course, parameters) in enumerate(zip(courses, self._parameters, strict=True)):
            updates = min(max(0, b + j - k), len(course.weights) - 1)
            for parameter, weights in zip(parameters, course.weights[updates], strict=True):
                parameter.data.copy_(weights)
        value, target = batch
        for stage in self._stages:
            value = stage(value)
        return list(torch.autograd.grad(F.cross_entropy(value, target), self._parameters[k]))


def angle(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Degrees between two vectors that are given in parts; exactly 0 for equal ones.

    The arc cosine would lose all small angles (Kahan, "How Futile are Mindless Assessments of
    Roundoff in Floating-Point Computation?", 2006, section 12).

    NaN if one of them has no direction: it is zero, or not finite.
    """
    a, b = (torch.cat([part.flatten().double() for part in parts]) for parts in (one, other))
    lengths = [float(vector.norm()) for vector in (a, b)]
    if not all(math.isfinite(length) and length > 0 for length in lengths):
        return math.nan
    a, b = a / lengths[0], b / lengths[1]
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def angles(
    stages: Sequence[nn.Module],
    courses: Sequence[Course],
    batches: Sequence[Batch],
    sampled: Sequence[int],
) -> tuple[list[list[float]], list[float]]:
    """[stage][sample] and, for the whole net, [sample], in degrees. They end before the first sample
    that has none at some stage: there training has diverged.

    Args:
        sampled: numbers of batches.
    """
    fresh = Fresh(stages)
    by_stage: list[list[float]] = [[] for _ in stages]
    of_net: list[float] = []
    for b in sampled:
        delayed = [course.gradients[b] for course in courses]
        now = [fresh.gradients(courses, batches[b], b, k) for k in range(len(stages))]
        found = [angle(one, other) for one, other in zip(delayed, now, strict=True)]
        if any(map(math.isnan, found)):
            break
        for known, new in zip(by_stage, found, strict=True):
            known.append(new)
        of_net.append(angle(list(chain.from_iterable(delayed)), list(chain.from_iterable(now))))
    return by_stage, of_net


def cut_evenly(chain: nn.Sequential, stages: int) -> tuple[list[int], list[nn.Module]]:
    """By the number of children: where to cut does not depend on the machine."""
    split = even_split(len(chain), stages)
    layers = list(chain)
    bounds = [0, *split, len(layers)]
    return split, [nn.Sequential(*layers[begin:end]) for begin, end in pairwise(bounds)]


def batches_of(study: Study, spec: data.DataSpec) -> list[Batch]:
    """The same on every call."""
    generator = torch.Generator().manual_seed(study.seed)
    drawn = []
    order = torch.randperm(len(spec.train), generator=generator)
    for b in range(study.batches):
        places = torch.arange(b * study.batch_size, (b + 1) * study.batch_size) % len(order)
        x, y = spec.train.batch(order[places], generator)
        drawn.append((F.avg_pool2d(x, study.pooled), y))
    return drawn


def run(study: Study, stages: int, mode: str) -> dict[str, Any]:
    """A row. On one thread, so that the same bits come on any number of cores."""
    set_threads_here(1)
    spec = data.load(study.data, augment=False)
    batches = batches_of(study, spec)
    sampled = study.sampled()
    torch.manual_seed(study.seed)
    chain = models.build(
        study.model, in_channels=spec.in_channels, num_classes=spec.num_classes,
        image_size=spec.image_size // study.pooled,
    )  # fmt: skip
    split, parts = cut_evenly(chain, stages)
    courses, losses = train(parts, batches, mode, study.lr)
    by_stage, of_net = angles(parts, courses, batches, sampled)
    seen = len(of_net)
    diverged = sampled[seen] if seen < len(sampled) else None
    last = losses[-study.batches // 5 :]
    return {
        "stages": stages,
        "mode": mode,
        "split": split,
        "delays": [2 * (stages - 1 - k) for k in range(stages)],
        "diverged": diverged,
        "last_losses": quartiles(last) if diverged is None else None,
        "sampled": sampled[:seen],
        "stage_degrees": by_stage,
        "net_degrees": of_net,
    }


def measure(
    study: Study, jobs: int, keep: Callable[[list[dict[str, Any]]], object], console: Console
) -> None:
    """Up to ``jobs`` runs at a time; ``keep`` gets the rows so far behind each, in the study's order."""
    # the longest first, so that none is left alone with one core at the end
    runs = [(stages, mode) for stages in sorted(study.stages, reverse=True) for mode in MODES]
    rows: list[dict[str, Any]] = []
    with side_by_side([partial(run, study, *named) for named in runs], jobs) as finished:
        for _, row in track(finished, "runs", len(runs), console=console):
            rows.append(row)
            keep(sorted(rows, key=lambda row: (row["stages"], MODES.index(row["mode"]))))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=Study.model, choices=models.names())
    parser.add_argument("--data", default=Study.data, choices=data.names())
    parser.add_argument("--batches", type=int, default=Study.batches)
    parser.add_argument("--every", type=int, default=Study.every, help="batches between two looks")
    parser.add_argument("--lr", type=float, default=Study.lr)
    parser.add_argument("--seed", type=int, default=Study.seed)
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other; default: 2")
    given = parsed(parser, arguments)
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {given.jobs}")
    study = QUICK
    if not given.quick:
        named = {name: getattr(given, name) for name in ("model", "data", "lr", "seed")}
        study = Study(**named, batches=given.batches, every=given.every)
    if not study.sampled():
        parser.error("--batches leaves no batch to look at: give more of them")
    settings = {**vars(study), "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    console = Console()
    kept: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        kept[:] = rows
        write("staleness", {"settings": settings, "rows": rows}, given.out)

    try:
        measure(study, given.jobs, keep, console)
    except KeyboardInterrupt:
        found = f"{len(kept)} runs are in {given.out}" if kept else "nothing was written"
        console.print(f"stopped; {found}")
        sys.exit(130)
    table = Table("K", "mode", "stage 0", "last stage", "whole net", "loss at the end")
    for row in kept:
        ends = (row["stage_degrees"][0], row["stage_degrees"][-1], row["net_degrees"])
        loss, diverged = row["last_losses"], row["diverged"]
        table.add_row(
            str(row["stages"]),
            row["mode"],
            *(f"{quartiles(found)['median']:.1f} degrees" if found else "" for found in ends),
            f"diverged by batch {diverged}" if loss is None else f"{loss['median']:.3f}",
        )
    console.print(table)
    console.print(f"written to {given.out}")


if __name__ == "__main__":
    main()
