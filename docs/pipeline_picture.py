"""Draws docs/pipeline.png from the schedule itself: python -m docs.pipeline_picture"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fdg_cuda.schedule import Kind, Schedule

STAGES, BATCHES = 3, 8
COLORS = {Kind.BACKWARD: "#e07b54", Kind.UPDATE: "#b9b9b9", Kind.FORWARD: "#5b8fc9"}
WIDTHS = {Kind.BACKWARD: 0.52, Kind.UPDATE: 0.1, Kind.FORWARD: 0.30}
NAMES = {Kind.BACKWARD: "backward", Kind.UPDATE: "update", Kind.FORWARD: "forward"}


def draw(file: Path) -> None:
    schedule = Schedule("fdg", STAGES)
    ticks = list(schedule.epoch(BATCHES))
    fig, ax = plt.subplots(figsize=(12, 2.9), layout="constrained")
    for tick, actions in enumerate(ticks):
        for stage in range(STAGES):
            shown = [a for a in actions if a.stage == stage and a.kind in COLORS]
            left = tick + 0.04
            if shown and shown[0].kind is Kind.FORWARD and schedule.backward_first(stage):
                left = tick + 0.66  # fill: the backward's time passes without one
            for action in shown:
                width = WIDTHS[action.kind]
                ax.barh(
                    stage, width, left=left, height=0.74, color=COLORS[action.kind], linewidth=0
                )
                if action.kind is not Kind.UPDATE:
                    ax.text(
                        left + width / 2, stage, str(action.batch),
                        ha="center", va="center", color="white", fontsize=11,
                    )  # fmt: skip
                left += width
    full = range(schedule.latency, BATCHES)
    for begin, end, name in (
        (0, full.start, "fill"),
        (full.start, full.stop, "steady state: every stage is always at work"),
        (full.stop, len(ticks), "drain"),
    ):
        ax.text((begin + end) / 2, -0.72, name, ha="center", fontsize=11)
        ax.axvline(end, color="#444444", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(STAGES), [f"stage {k}\n(device {k})" for k in range(STAGES)])
    ax.set_ylim(STAGES - 0.5, -1.0)
    ax.set_xlim(0, len(ticks))
    ax.set_xticks([t + 0.5 for t in range(len(ticks))], range(len(ticks)))
    ax.set_xlabel("tick (the number in a bar is the batch it works on)")
    ax.tick_params(length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in COLORS]
    fig.legend(
        handles, [NAMES[k] for k in COLORS], loc="outside upper right", ncols=3, frameon=False
    )
    fig.savefig(file, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("pipeline.png"))
