"""The best cut: compared with all cuts there are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.costs import LayerCost
from fdg_cuda.cutting import Cut, CutMemoryError, best_cut
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.schedule import METHODS, Schedule
from fdg_cuda.simulation import StageTimes, simulate
from fdg_cuda.split import check_split
from fdg_cuda.stage_memory import Holding, stage_memory

STASH, CURRENT, REPLAY = BackwardWeights
FDG2, FDG3 = Schedule("fdg", 2), Schedule("fdg", 3)
# Bytes enough that only activations matter.
EVEN = [LayerCost(1.0, 2.0, saved_bytes=1000)] * 12


def cpus(count: int, memory: int | None = None) -> list[DeviceSpec]:
    return [DeviceSpec(f"device {k}", memory) for k in range(count)]


def longest_and_needed(
    costs: Sequence[LayerCost],
    split: Sequence[int],
    devices: Sequence[DeviceSpec],
    schedule: Schedule,
    mode: BackwardWeights,
    hops: Sequence[Link],
    update: float,
) -> tuple[float, list[int]]:
    """The longest time of a split, and the bytes of each stage; layer by layer."""
    bounds = list(itertools.pairwise([0, *split, len(costs)]))
    times, needed, there_and_back = [], [], 0.0
    for k, (begin, end) in enumerate(bounds):
        again = mode is REPLAY and schedule.slots(k) > 1
        compute = sum(c.forward * (2 if again else 1) + c.backward for c in costs[begin:end])
        sending = 0.0
        if k > 0 and costs[begin].error_bytes:
            sending += (
                costs[begin].error_bytes / hops[k - 1].bytes_per_second + hops[k - 1].latency_s
            )
        if k < len(bounds) - 1 and costs[end - 1].output_bytes:
            sending += costs[end - 1].output_bytes / hops[k].bytes_per_second + hops[k].latency_s
        weights = sum(c.parameter_bytes for c in costs[begin:end])
        times += [(compute + weights * update) / devices[k].speed, sending]
        if k == len(bounds) - 1:
            there_and_back += compute / devices[k].speed
        if k == len(bounds) - 2:
            behind = sum(c.forward for c in costs[begin:end]) + weights * update
            down = 0.0
            if k > 0 and costs[begin].error_bytes:
                down = (
                    costs[begin].error_bytes / hops[k - 1].bytes_per_second + hops[k - 1].latency_s
                )
            there_and_back += times[-2] + max(0.0, down - behind / devices[k].speed)
            for nbytes in (costs[end - 1].output_bytes, costs[end].error_bytes):
                if nbytes:
                    there_and_back += nbytes / hops[k].bytes_per_second + hops[k].latency_s
        above = costs[end] if end < len(costs) else None
        needed.append(stage_memory(costs[begin:end], above, Holding.of(schedule, mode, k)).total)
    if schedule.method == "fdg" and len(bounds) > 1:
        times.append(there_and_back / 2)
    return max(times), needed


def fits(needed: list[int], devices: Sequence[DeviceSpec]) -> bool:
    for name in {device.name for device in devices}:
        stages = [k for k, device in enumerate(devices) if device.name == name]
        limit = devices[stages[0]].memory_bytes
        if limit is not None and sum(needed[k] for k in stages) > limit:
            return False
    return True


@pytest.mark.parametrize("seed", range(200))
def test_no_cut_is_better(seed: int) -> None:
    draw = random.Random(seed)
    n = draw.randint(1, 9)
    stages = draw.randint(1, min(n, 5))
    schedule = Schedule(draw.choice(METHODS), stages)
    mode = draw.choice(list(BackwardWeights))
    # Whole numbers and powers of two: sums are exact, whatever their order.
    costs = [
        LayerCost(
            draw.randint(0, 9),
            draw.randint(0, 20),
            **{
                name: draw.choice([0, 1, draw.randint(0, 30)]) * 64
                for name in (
                    "parameter_bytes",
                    "fixed_bytes",
                    "saved_bytes",
                    "input_bytes",
                    "output_bytes",
                    "error_bytes",
                    "kept_input_bytes",
                )
            },
        )
        for _ in range(n)
    ]
    costs = [replace(cost, kept_output_bytes=cost.output_bytes // 2) for cost in costs]
    hops = [
        draw.choice([Link(), Link(draw.choice([16.0, 64.0, 256.0]), draw.choice([0.0, 0.5]))])
        for _ in range(stages - 1)
    ]
    # Neighbours that share a device, and others that do not.
    names = sorted(draw.choice("abcde") for _ in range(stages))
    memories = {
        name: draw.choice([None, draw.randint(10, 120) * 256 * names.count(name)]) for name in names
    }
    devices = [DeviceSpec(name, memories[name], draw.choice([1.0, 0.5, 2.0])) for name in names]

    update = draw.choice([0.0, 1 / 256])
    allowed = sorted(draw.sample(range(1, n), draw.randint(stages - 1, n - 1)))
    every = {
        split: longest_and_needed(costs, split, devices, schedule, mode, hops, update)
        for split in itertools.combinations(allowed, stages - 1)
    }
    cut_best = partial(
        best_cut,
        costs,
        devices,
        schedule,
        mode,
        hops=hops,
        update_seconds_per_byte=update,
        allowed=allowed,
    )
    possible = [longest for longest, needed in every.values() if fits(needed, devices)]
    if not possible:
        with pytest.raises(CutMemoryError) as caught:
            cut_best()
        least = min(
            max(
                sum(
                    n for n, other in zip(needed, devices, strict=True) if other.name == device.name
                )
                - device.memory_bytes
                for device in devices
                if device.memory_bytes is not None
            )
            for _, needed in every.values()
        )
        assert caught.value.shortage_bytes == pytest.approx(least, rel=1e-3, abs=64)
        return
    cut = cut_best()
    assert check_split(cut.split, n, stages) == cut.split
    longest, needed = every[tuple(cut.split)]
    assert fits(needed, devices)
    assert longest == min(possible) == cut.longest
    assert [memory.total for memory in cut.memory] == needed
    if cut.split and len(set(names)) == stages:
        best = [s for s, (t, m) in every.items() if t == longest and fits(m, devices)]
        assert cut.split[-1] == min(split[-1] for split in best)


def test_more_blocks_than_one() -> None:
    """A chain longer than what is looked at together, and its prefix is balanced too."""
    draw = random.Random(0)
    costs = [LayerCost(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(400)]
    costs[-1] = LayerCost(10_000, 0)
    cut = best_cut(costs, cpus(4), Schedule("fdg", 4), STASH)
    assert cut.split[-1] == 399
    seconds = cut.stage_seconds[:3]
    assert max(seconds) - min(seconds) <= 36
    # In steps of two thirds as well.
    for k in range(3):
        again = best_cut(costs[:399], cpus(3), FDG3, STASH)
        assert again.split == cut.split[:2]
        assert again.stage_seconds[k] == seconds[k]


def test_memory_moves_the_cut() -> None:
    free = best_cut(EVEN, cpus(2), FDG2, STASH)
    assert free.split == [6]
    # Stage 0 holds two batches, stage 1 one.
    assert [memory.activations for memory in free.memory] == [12_000, 6_000]
    earlier = best_cut(EVEN, cpus(2, 8_000), FDG2, STASH)
    assert earlier.split == [4]
    assert earlier.longest == 24
    later = best_cut(EVEN, [DeviceSpec("large"), DeviceSpec("small", 3_000)], FDG2, STASH)
    assert later.split == [9]
    # Of what is held, replay keeps one batch's, but goes forward twice.
    replay = best_cut(EVEN, cpus(2, 8_000), FDG2, REPLAY)
    assert [memory.activations for memory in replay.memory] == [5_000, 7_000]
    assert replay.stage_seconds == [20, 21]


def test_a_shared_devices_memory_is_shared() -> None:
    both = [DeviceSpec("card", 17_000)] * 2
    # 2 * 6000 + 6000 are too many.
    cut = best_cut(EVEN, both, FDG2, STASH)
    assert cut.split == [5]
    assert sum(memory.total for memory in cut.memory) == 17_000
    # Of many layers, one fewer on the longest stage is little, and counts.
    cut = best_cut(EVEN[:1] * 400, [DeviceSpec("card", 540_000)] * 2, FDG2, STASH)
    assert cut.split == [140]
    # Stages that are no neighbours have their parts of it: 9 of 18 kB each.
    parts = [DeviceSpec("a", 18_000), DeviceSpec("b"), DeviceSpec("a", 18_000)]
    apart = best_cut(EVEN, parts, FDG3, STASH)
    assert apart.memory[0].total <= 9_000
    assert apart.split[0] == 2


def test_devices_and_links_that_differ() -> None:
    fast = [DeviceSpec("slow"), DeviceSpec("fast", speed=3.0)]
    assert best_cut(EVEN, fast, FDG2, STASH).split == [3]
    narrow = [replace(cost, output_bytes=1000, error_bytes=1000) for cost in EVEN]
    narrow[7] = replace(narrow[7], output_bytes=10)
    narrow[8] = replace(narrow[8], error_bytes=10)
    slow = [Link(10.0, 1.0)]
    cut = best_cut(narrow, cpus(2), FDG2, STASH, hops=slow)
    assert cut.split == [8]
    assert cut.stage_seconds == [24, 12]
    assert cut.hop_seconds == [2, 2]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_longest_time_is_what_the_schedules_replay_takes(stages: int) -> None:
    """Its update, and the round trip of the last two stages with hops that take as long as layers."""
    draw = random.Random(29)  # where the round trip decides, with all of these numbers of stages
    schedule, links = Schedule("fdg", stages), [Link(1.0)] * (stages - 1)
    costs = [
        LayerCost(
            draw.randint(1, 5),
            draw.randint(1, 9),
            parameter_bytes=draw.randint(0, 4),
            output_bytes=draw.randint(1, 8),
            error_bytes=draw.randint(1, 8),
        )
        for _ in range(9)
    ]

    def replayed(split: Sequence[int]) -> float:
        times = []
        for k, (begin, end) in enumerate(itertools.pairwise([0, *split, len(costs)])):
            times.append(
                StageTimes(
                    sum(cost.forward for cost in costs[begin:end]),
                    sum(cost.backward for cost in costs[begin:end]),
                    sum(cost.parameter_bytes for cost in costs[begin:end]),
                    links[k].seconds(costs[end - 1].output_bytes) if k < stages - 1 else 0.0,
                    links[k - 1].seconds(costs[begin].error_bytes) if k > 0 else 0.0,
                )
            )
        return simulate(schedule, times, 30).tick_seconds

    cut = best_cut(costs, cpus(stages), schedule, STASH, hops=links, update_seconds_per_byte=1.0)
    assert cut.longest == replayed(cut.split)
    assert cut.longest == min(map(replayed, itertools.combinations(range(1, 9), stages - 1)))
    assert cut.longest == cut.round_trip_seconds > max(*cut.stage_seconds, *cut.hop_seconds)


def test_what_fits_instead_is_said() -> None:
    with pytest.raises(CutMemoryError, match=r"split=\[4\]") as caught:
        best_cut(EVEN, cpus(2, 7_500), FDG2, CURRENT)
    error = caught.value
    assert list(error.stages) == [0] or list(error.stages) == [1]
    assert error.shortage_bytes == 500
    assert error.fitting_modes == [REPLAY]
    assert "backward_weights='replay' would fit" in str(error)
    with pytest.raises(CutMemoryError, match="Try smaller batches") as caught:
        best_cut(EVEN, [DeviceSpec("card", 3_000)] * 2, FDG2, STASH)
    assert list(caught.value.stages) == [0, 1]
    assert caught.value.fitting_modes == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3"):
        best_cut(EVEN[:2], cpus(3), FDG3, STASH)
    with pytest.raises(ValueError, match=r"before the layers \[5\].*at most 2 devices"):
        best_cut(EVEN, cpus(3), FDG3, STASH, allowed=[5])
    with pytest.raises(ValueError, match="need 3 devices and 2 hops"):
        best_cut(EVEN, cpus(2), FDG3, STASH)
    with pytest.raises(ValueError, match="need 3 devices and 2 hops"):
        best_cut(EVEN, cpus(3), FDG3, STASH, hops=[Link()])
    with pytest.raises(ValueError, match="different memories"):
        best_cut(EVEN, [DeviceSpec("a", 1), DeviceSpec("a")], FDG2, STASH)
    for wrong in ({"speed": 0.0}, {"speed": float("inf")}, {"memory_bytes": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DeviceSpec("a", **wrong)  # type: ignore[arg-type]
    for bad in ({"bytes_per_second": 0.0}, {"latency_s": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Link(**bad)


def test_one_stage() -> None:
    assert best_cut(EVEN, cpus(1), Schedule("bp", 1), STASH) == Cut(
        [], [36.0], [0.0], [stage_memory(EVEN, None, Holding.of(Schedule("bp", 1), STASH, 0))]
    )
