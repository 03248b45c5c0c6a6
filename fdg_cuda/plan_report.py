"""A plan for people: tables, the predicted timeline as a picture, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdg_cuda.files import replacing
from fdg_cuda.plans import Choice, Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE, PICTURE = "plan.json", "plan.png"
MOST_STAGES_OF_THE_PAPERS = 4
WIDTH = 140  # of tables as text
SHORT_SECONDS = 3e-3  # of a step on the CPU
MOST_TIMES_BP = 1.5  # that one stage should take: it is BP, with another number of threads
UNITS = ("B", "kB", "MB", "GB", "TB")


def renderables(plan: Plan) -> Iterator[RenderableType]:
    """What a rich console prints."""
    from rich.table import Table

    table = Table(
        title=f"{plan.layers} layers, batches of {plan.batch_size}: speed beside BP on one device "
        f"({milliseconds(plan.bp_seconds)} per batch)",
        title_justify="left",
    )
    for heading in ("K", "mode", "ms per batch", "fdg", "ddg", "data parallel", "memory", "sent"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    table.add_column("stages begin at", overflow="fold")
    for row in plan.rows:
        choice = row.choice
        if choice is None:
            table.add_row(str(row.stages), "none fits")
            continue
        table.add_row(
            f"> {row.stages}" if choice is plan.recommended else str(row.stages),
            choice.mode,
            f"{1e3 * choice.tick_seconds:.3g}",
            times(plan.speed_up(choice.tick_seconds)),
            times(plan.speed_up(choice.ddg_seconds)),
            times(plan.speed_up(choice.data_parallel_seconds))
            if choice.data_parallel_fits
            else "no memory",
            size(max(stage.memory_bytes for stage in choice.stages)),
            size(max(stage.up_bytes + stage.down_bytes for stage in choice.stages)),
            ", ".join(stage.begins_at for stage in choice.stages[1:]),
        )
    yield table
    yield "> recommended; memory, sent: of the stage with most; sent per batch, up and down"
    for row in plan.rows:
        if row.choice is None:
            yield f"K = {row.stages}: {row.why_not}"
    if plan.recommended is not None:
        yield stages_table(plan.recommended)
        yield f"recommended: {call(plan.recommended, capture=plan.capture)}"
        yield from _doubts_of(plan, plan.recommended)
        if plan.advice:
            yield plan.advice
        delay = 2 * (len(plan.recommended.stages) - 1)
        if len(plan.recommended.stages) > MOST_STAGES_OF_THE_PAPERS:
            yield (
                f"The first stage's gradients are {delay} batches old then; the papers go to "
                f"{MOST_STAGES_OF_THE_PAPERS} stages, and what more do to learning is for you to try."
            )
    if plan.doubt:
        yield f"WARNING: {plan.doubt}"


def _doubts_of(plan: Plan, choice: Choice) -> Iterator[str]:
    """What else one would do, where that is as good."""
    stages = len(choice.stages)
    if stages == 1 and any(row.choice and row.stages > 1 for row in plan.rows):
        yield "That is plain training: no number of stages is predicted to be worth its delay here."
    elif (
        stages > 1
        and choice.data_parallel_fits
        and choice.data_parallel_seconds < choice.tick_seconds
    ):
        yield (
            f"Data parallelism, with a batch of {plan.batch_size} for each of the {stages} devices and "
            f"without delays, is predicted to be faster: "
            f"{times(plan.speed_up(choice.data_parallel_seconds))}, "
            f"{times(plan.speed_up(choice.tick_seconds))} here."
        )
    if stages == 1 and choice.tick_seconds > MOST_TIMES_BP * plan.bp_seconds:
        yield (
            f"But with all of its threads one stage is predicted to take "
            f"{milliseconds(choice.tick_seconds)}, BP with as many as serve it best "
            f"{milliseconds(plan.bp_seconds)}. Either something else kept this machine busy while "
            f"layers were measured: plan again when it is quiet. Or this model is too small for so "
            f"many threads: FDGRunner(..., cpu_threads=1)."
        )
    if stages > 1 and on_cpu(choice) and choice.tick_seconds < SHORT_SECONDS:
        yield (
            f"Steps of {milliseconds(choice.tick_seconds)} are largely Python's, whose lock CPU "
            f"stages share: that is not predicted here. Measure it."
        )


def as_text(plan: Plan) -> str:
    """What the command line prints."""
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=WIDTH, highlight=False, markup=False)
    for renderable in renderables(plan):
        console.print(renderable)
    return text.getvalue()


def stages_table(choice: Choice) -> Any:
    """The stages of one choice."""
    from rich.table import Table

    table = Table(title=f"K = {len(choice.stages)}, {choice.mode}", title_justify="left")
    for heading in ("stage", "device", "begins at"):
        table.add_column(heading, overflow="fold")
    for heading in ("ms per batch", "busy", "memory", "sends up", "sends down"):
        table.add_column(heading, justify="right")
    for number, stage in enumerate(choice.stages):
        table.add_row(
            str(number),
            stage.device,
            stage.begins_at,
            f"{1e3 * stage.seconds:.3g}",
            f"{100 * stage.busy:.0f} %",
            size(stage.memory_bytes),
            size(stage.up_bytes),
            size(stage.down_bytes),
        )
    return table


def call(choice: Choice, *, capture: bool = False) -> str:
    """How a runner is made for ``choice``; CUDA devices are for the reader to fill in."""
    split = f", split={list(choice.split)}" if choice.split else ""
    captured = ", capture=True" if capture and choice.split else ""
    count = len(choice.stages)
    devices = ["cpu"] * count if on_cpu(choice) else f"[...{count} of them]"
    weights = f", backward_weights={choice.mode!r}" if choice.split else ""
    return f"FDGRunner(model, devices={devices}{split}{captured}{weights})"


def on_cpu(choice: Choice) -> bool:
    """Whether its stages are on this machine's processor."""
    return all(stage.device == "cpu" for stage in choice.stages)


def write_plan(plan: Plan, folder: Path, command: str) -> list[Path]:
    """``plan.json``, and ``plan.png`` if there is something to draw.

    Raises:
        OSError: a file cannot be written.
    """
    from fdg_cuda.timeline_picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / TABLE]
    with replacing(files[0]) as temporary:
        temporary.write_text(json.dumps({"command": command, **as_dict(plan)}, indent=1) + "\n")
    if plan.recommended is not None:
        files.append(folder / PICTURE)
        draw(files[1], plan.recommended.timeline)
    return files


def as_dict(plan: Plan) -> dict[str, Any]:
    """All figures."""
    recommended = plan.recommended
    return {
        "batch_size": plan.batch_size,
        "layers": plan.layers,
        "bp_seconds": plan.bp_seconds,
        "recommended_stages": None if recommended is None else len(recommended.stages),
        "rows": [
            {"stages": row.stages, "why_not": row.why_not}
            if row.choice is None
            else {"stages": row.stages, **_choice_dict(plan, row.choice)}
            for row in plan.rows
        ],
    }


def _choice_dict(plan: Plan, choice: Choice) -> dict[str, Any]:
    return {
        "mode": choice.mode,
        "split": list(choice.split),
        "tick_seconds": choice.tick_seconds,
        "speed_up": plan.speed_up(choice.tick_seconds),
        "ddg_seconds": choice.ddg_seconds,
        "data_parallel_seconds": choice.data_parallel_seconds,
        "data_parallel_fits": choice.data_parallel_fits,
        "by_stage": [vars(stage) for stage in choice.stages],
    }


def milliseconds(seconds: float) -> str:
    """``12.3 ms``."""
    return f"{1e3 * seconds:.3g} ms"


def times(ratio: float) -> str:
    """``1.93 x``."""
    return f"{ratio:.2f} x"


def size(nbytes: float) -> str:
    """``12.3 MB``; units of 1000."""
    value, units = float(nbytes), list(UNITS)
    while value >= 999.5 and len(units) > 1:
        value /= 1e3
        units.pop(0)
    return f"{value:.3g} {units[0]}"
