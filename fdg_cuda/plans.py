"""What a plan says: how fast, cut where, with how much memory, for every number of stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from fdg_cuda.timeline import Timeline
from fdg_cuda.uneven import CUTS_INSIDE, longest_in_means, said_of_uneven

# Times the mean: beyond it a stage's time is worth a cut inside the children.
UNEQUAL = 1.05
LEAST_SECONDS = 1e-3  # of a stage; less is measured too roughly for that
# Times the number of stages: beyond it is no cache effect any more.
MOST_SPEED_UP = 1.25


@dataclass(frozen=True)
class StagePlan:
    """One stage of a planned cut.

    Attributes:
        device: its name.
        begins_at: what it begins with, as people know it.
        seconds: its forward, backward and update of one batch.
        busy: share of the time in which it is at work, 0 to 1.
        memory_bytes: with the batches it holds.
        up_bytes, down_bytes: what it sends per batch, to the stages above and below.
    """

    device: str
    begins_at: str
    seconds: float
    busy: float
    memory_bytes: int
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Choice:
    """A cut into ``len(stages)`` stages.

    Attributes:
        mode: the ``backward_weights``.
        split: the layers (or pieces) at which stages 1, 2, ... begin.
        tick_seconds: a batch is trained per tick with ``"fdg"``.
        ddg_seconds: per batch, with ``"ddg"`` and the same cut.
        data_parallel_seconds: per batch, of as many replicas with a batch of this size each.
        data_parallel_fits: whether each device has the memory for the whole model.
        timeline: of some ticks.
    """

    mode: str
    split: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    tick_seconds: float
    ddg_seconds: float
    data_parallel_seconds: float
    data_parallel_fits: bool
    timeline: Timeline = field(repr=False)


@dataclass(frozen=True)
class Row:
    """The best choice for ``stages`` stages, or why there is none."""

    stages: int
    choice: Choice | None
    why_not: str = ""


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Attributes:
        rows: by the number of stages.
        recommended: the fastest choice whose stages are all worth having; None if nothing fits.
        bp_seconds: of a training step with BP on the first device, if it had the memory; on CPU devices
            with as many of the cores as serve it best.
        batch_size: samples per batch.
        layers: how many the model was measured as.
        fastest_speed: of the fastest device, in times the first one's.
        note: what could not be measured as it should have been; else empty.
        capture: whether its cuts are those of ``FDGRunner(..., capture=True)``.
        between_children: whether its cuts lie between the children of an ``nn.Sequential`` only, though
            there are modules in them.
    """

    rows: tuple[Row, ...]
    recommended: Choice | None
    bp_seconds: float
    batch_size: int
    layers: int
    fastest_speed: float = 1.0
    note: str = ""
    capture: bool = False
    between_children: bool = False

    def __str__(self) -> str:
        """The tables, as the command line prints them."""
        from fdg_cuda.plan_report import as_text

        return as_text(self)

    def speed_up(self, seconds: float) -> float:
        """Of so many seconds per batch over BP on the first device."""
        return self.bp_seconds / seconds

    @property
    def advice(self) -> str:
        """What may be faster, if stages take unlike times and can be cut elsewhere; else empty."""
        several = [row.choice for row in self.rows if row.choice and len(row.choice.stages) > 1]
        if not several or not self.between_children:
            return ""
        choice = self.recommended
        if choice is None or len(choice.stages) == 1:
            # That more are not worth it may be due to how they are cut.
            choice = min(several, key=lambda each: each.tick_seconds)
        seconds = [stage.seconds for stage in choice.stages]
        if longest_in_means(seconds) <= UNEQUAL or max(seconds) < LEAST_SECONDS:
            return ""
        said = said_of_uneven(seconds)
        return f"{said[0].upper()}{said[1:]}: {CUTS_INSIDE}."

    @property
    def doubt(self) -> str:
        """Why the figures cannot be right, if they cannot; empty if they may."""
        if self.note:
            return self.note
        for row in self.rows:
            most = MOST_SPEED_UP * row.stages * self.fastest_speed
            reached = 0.0 if row.choice is None else self.speed_up(row.choice.tick_seconds)
            if reached > most:
                return (
                    f"{row.stages} stages cannot be {reached:.1f} times as fast as one: something else "
                    f"kept this machine busy while layers were measured. Plan again when it is quiet."
                )
        return ""
