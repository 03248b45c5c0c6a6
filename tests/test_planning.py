"""The plan: what follows from costs that are given, and that real models can be planned."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Cli
from torch import nn

from fdg_cuda import FDGRunner, Plan, plan, planner
from fdg_cuda.costs import LayerCost
from fdg_cuda.hardware import DeviceSpec, Link
from fdg_cuda.hardware_file import Hardware
from fdg_cuda.plan_report import call
from fdg_cuda.planner import numbers_of_stages

MEGA = 1_000_000
# Eight equal layers: 10 ms forward, 20 ms backward, hops of 4 MB, 8 MB kept for the backward.
LAYER = LayerCost(
    forward=0.01,
    backward=0.02,
    parameter_bytes=MEGA,
    saved_bytes=8 * MEGA,
    input_bytes=4 * MEGA,
    output_bytes=4 * MEGA,
    error_bytes=4 * MEGA,
)
LAYERS = 8


@pytest.fixture
def given_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner.Planner, "_costs", lambda self, stages: [LAYER] * LAYERS)
    monkeypatch.setattr(planner, "update_seconds_per_byte", lambda device, threads: 1e-9)
    monkeypatch.setattr(planner, "slowdown_in_company", lambda *_, **__: 1.0)


def plan_for(*devices: DeviceSpec, link: Link | None = None, mode: str | None = None) -> Plan:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(LAYERS)))
    hardware = Hardware(devices, link or Link())
    return plan(model, torch.randn(2, 4), hardware=hardware, backward_weights=mode)


def devices(count: int, memory: int | None = None) -> list[DeviceSpec]:
    return [DeviceSpec(f"device {number}", memory) for number in range(count)]


STEP = LAYERS * (0.03 + 1e-3)


@pytest.mark.usefixtures("given_costs")
class TestOfGivenCosts:
    def test_equal_layers_speed_up_with_every_stage_and_shrink_to_bp_with_one(self) -> None:
        planned = plan_for(*devices(4))
        assert planned.bp_seconds == pytest.approx(STEP)
        ticks = [row.choice.tick_seconds for row in planned.rows if row.choice]
        # Three stages of eight layers: one has three of them.
        assert ticks == pytest.approx([STEP, STEP / 2, STEP * 3 / 8, STEP / 4])
        choice = planned.rows[3].choice
        assert choice is not None
        assert choice.split == (2, 4, 6)
        assert [stage.begins_at for stage in choice.stages] == ["0", "2", "4", "6"]
        assert [stage.busy for stage in choice.stages] == pytest.approx([1.0] * 4)
        assert [stage.up_bytes for stage in choice.stages] == [4 * MEGA] * 3 + [0]
        assert [stage.down_bytes for stage in choice.stages] == [0] + [4 * MEGA] * 3
        assert planned.recommended is choice

    def test_hops_cost_less_in_fdg_than_in_ddg(self) -> None:
        hop = 0.01
        row = plan_for(*devices(4), link=Link(4 * MEGA / hop)).rows[3]
        assert row.choice is not None
        # The last two stages: there and back, and both of them at work, within two ticks.
        assert row.choice.tick_seconds == pytest.approx((4 * 0.03 * 2 / 2 + 0.002 + 2 * hop) / 2)
        # All stages one behind the other, with six hops.
        assert row.choice.ddg_seconds > 1.04 * row.choice.tick_seconds

    def test_data_parallelism_pays_for_its_ring(self) -> None:
        free, slow = (
            plan_for(*devices(2), link=link).rows[1].choice
            for link in (Link(), Link(bytes_per_second=10 * MEGA))
        )
        assert free is not None
        assert slow is not None
        assert free.data_parallel_seconds == pytest.approx(STEP / 2)
        # Each of two replicas sends half of 8 MB twice: 0.8 s, of which the backward hides 0.16 s.
        assert slow.data_parallel_seconds == pytest.approx((STEP + 0.8 - 0.16) / 2)

    def test_a_slow_link_is_the_tick_and_not_worth_a_stage(self) -> None:
        planned = plan_for(*devices(2), link=Link(bytes_per_second=10 * MEGA))
        choice = planned.rows[1].choice
        assert choice is not None
        assert choice.tick_seconds >= 0.4
        assert max(stage.busy for stage in choice.stages) < 0.6
        assert planned.recommended is planned.rows[0].choice

    def test_memory_decides_on_the_mode_and_on_the_cut(self) -> None:
        modes = {}
        for memory in (400 * MEGA, 120 * MEGA, 20 * MEGA):
            row = plan_for(*devices(4, memory)).rows[3]
            modes[memory] = row.choice.mode if row.choice else row.why_not
            if row.choice:
                assert all(stage.memory_bytes <= memory for stage in row.choice.stages)
        assert modes[400 * MEGA] == "stash"
        assert modes[120 * MEGA] == "replay"
        assert "more than there is" in modes[20 * MEGA]
        # A whole replica needs 100 MB: weights, momentum, gradients, activations and the input.
        assert [
            row.choice.data_parallel_fits
            for memory in (104 * MEGA, 90 * MEGA)
            for row in plan_for(*devices(4, memory)).rows[3:]
            if row.choice
        ] == [True, False]

    def test_a_device_twice_as_fast_gets_twice_as_much(self) -> None:
        fast = DeviceSpec("fast", speed=2.0)
        choice = plan_for(fast, DeviceSpec("slow")).rows[1].choice
        assert choice is not None
        assert choice.split == (5,)

    def test_unequal_stages_are_pointed_out_where_cuts_inside_the_children_are_left(self) -> None:
        equal, unequal = plan_for(*devices(4)), plan_for(*devices(3))
        assert unequal.recommended is not None
        assert [len(unequal.recommended.stages), equal.advice] == [3, ""]
        # 3, 3 and 2 of the layers.
        assert re.search(r"The longest of 3 stages takes 1\.1[23] times their mean", unequal.advice)
        assert unequal.advice in str(unequal)
        assert replace(unequal, between_children=False).advice == ""
        # Nor are so unequal stages that one is as good a reason to be silent.
        alone = replace(unequal, recommended=unequal.rows[0].choice)
        assert alone.advice == unequal.advice

    def test_stages_too_short_to_be_measured_well_are_no_reason_for_advice(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        short = replace(LAYER, forward=1e-5, backward=2e-5, parameter_bytes=0)
        monkeypatch.setattr(planner.Planner, "_costs", lambda self, stages: [short] * LAYERS)
        assert plan_for(*devices(3)).advice == ""

    def test_what_is_slower_than_bp_is_not_recommended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One stage may be, with more threads than serve it."""
        monkeypatch.setattr(planner.Planner, "bp_seconds", lambda self, most: STEP / 2.05)
        planned = plan_for(*devices(2))
        assert planned.recommended is planned.rows[0].choice
        assert "plain training: no number of stages is predicted to be worth its delay" in str(
            planned
        )
        assert "with all of its threads one stage is predicted to take" in str(planned)
        alone = plan_for(*devices(1))
        assert "plain training" not in str(alone), "more than one were not planned"

    def test_data_parallelism_is_recommended_where_it_is_faster(self) -> None:
        said = "Data parallelism, with a batch of 2 for each of the 3 devices"
        assert said in str(plan_for(*devices(3))), "three replicas share eight layers evenly"
        assert said not in str(plan_for(*devices(3, 90 * MEGA))), "they do not fit"

    def test_short_steps_on_the_cpu_are_to_be_measured(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = "are largely Python's"
        cpu = [DeviceSpec("cpu"), DeviceSpec("cpu")]
        assert said not in str(plan_for(*cpu))
        short = replace(LAYER, forward=1e-4, backward=2e-4, parameter_bytes=0)
        monkeypatch.setattr(planner.Planner, "_costs", lambda self, stages: [short] * LAYERS)
        assert said in str(plan_for(*cpu))
        assert said not in str(plan_for(*devices(2)))

    def test_the_call_is_to_be_copied_where_devices_have_no_numbers(self) -> None:
        row = plan_for(DeviceSpec("cpu"), DeviceSpec("cpu"), mode="current").rows[1]
        assert row.choice is not None
        said = "FDGRunner(model, devices=['cpu', 'cpu'], split=[4], backward_weights='current')"
        assert call(row.choice) == said
        row = plan_for(*devices(2)).rows[1]
        assert row.choice is not None
        assert "devices=[...2 of them], split=[4]" in call(row.choice)

    def test_one_mode_only(self) -> None:
        planned = plan_for(*devices(2), mode="replay")
        assert planned.rows[1].choice is not None
        assert planned.rows[1].choice.mode == "replay"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
def test_a_batch_is_no_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    batch = (torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(TypeError) as raised:
        plan(model, batch, ["cpu"])
    assert "plan(model, x, target=y)" in "".join(raised.value.__notes__)


@pytest.mark.usefixtures("given_costs")
def test_more_stages_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "share_of_cores", lambda cores, stages: max(1, 2 // stages))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))
    planned = plan(model, torch.randn(2, 4), ["cpu"] * 4)
    ticks = [row.choice.tick_seconds for row in planned.rows if row.choice]
    assert ticks[3] == pytest.approx(ticks[1])
    assert planned.recommended is planned.rows[1].choice
    assert not planned.doubt


@pytest.mark.usefixtures("given_costs")
def test_stages_that_share_a_processor_slow_each_other_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowdown = {1: 1.0, 2: 1.25}
    monkeypatch.setattr(planner, "share_of_cores", lambda cores, stages: max(1, 2 // stages))
    monkeypatch.setattr(
        planner, "slowdown_in_company", lambda parts, *_, **__: slowdown[len(parts)]
    )
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))
    planned = plan(model, torch.randn(2, 4), ["cpu"] * 4)
    ticks = [row.choice.tick_seconds for row in planned.rows if row.choice]
    assert ticks[:2] == pytest.approx([STEP, STEP / 2 * 1.25])
    assert ticks[3] == pytest.approx(ticks[1]), "two at once there too"
    assert planned.bp_seconds == pytest.approx(STEP)


@pytest.mark.usefixtures("given_costs")
def test_what_cannot_be_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(LAYER, forward=1.0)
    monkeypatch.setattr(
        planner.Planner, "_costs", lambda self, stages: [slow if stages == 1 else LAYER] * LAYERS
    )
    monkeypatch.setattr(planner, "share_of_cores", lambda cores, stages: 1)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))
    assert not plan(model, torch.randn(2, 4), ["cpu"] * 2).doubt, "BP with half of the cores"
    monkeypatch.setattr(planner.Planner, "bp_seconds", lambda self, most: 8.0)
    planned = plan(model, torch.randn(2, 4), ["cpu"] * 2)
    assert "cannot be" in planned.doubt
    assert planned.doubt in " ".join(str(planned).split())


def test_numbers_of_stages() -> None:
    assert numbers_of_stages(1) == [1]
    assert numbers_of_stages(3) == [1, 2, 3]
    assert numbers_of_stages(20) == [*range(1, 9), 16, 20]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.a(x).relu()
        return self.c(self.dropout(self.norm(self.b(skip).relu())) + skip)


@pytest.mark.parametrize("with_target", [False, True])
def test_a_model_is_planned_and_left_alone(one_torch_thread: None, with_target: bool) -> None:
    model, x = Net().eval(), torch.randn(32, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = torch.randint(0, 8, (32,)) if with_target else None
    state = torch.get_rng_state()
    planned = plan(model, x, ["cpu", "cpu"], target=target)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.norm.training
    assert [row.stages for row in planned.rows] == [1, 2]
    for row in planned.rows:
        assert row.choice is not None
        assert 0 < row.choice.tick_seconds < math.inf
    two = planned.rows[1].choice
    assert two is not None
    # What it says can be done.
    runner = FDGRunner(Net(), ["cpu", "cpu"], split=list(two.split), sample=x)
    assert runner.split_points == [stage.begins_at for stage in two.stages[1:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": ["cpu"], "hardware": "here.toml"}, "give one of them"),
        ({"backward_weights": "stach"}, "backward_weights must be one of stash, current, replay"),
        ({"sample": [1]}, "the sample must be a tensor"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    given = {"sample": torch.randn(4, 16), **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        plan(Net(), **given)  # type: ignore[arg-type]


def test_the_command_prints_draws_and_writes(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan --model mlp --devices cpu,cpu --batch-size 16 --out out") == 0
    said = capfd.readouterr().out
    assert "recommended: FDGRunner(model" in said
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [row["stages"] for row in written["rows"]] == [1, 2]
    assert written["rows"][1]["speed_up"] == pytest.approx(
        written["bp_seconds"] / written["rows"][1]["tick_seconds"]
    )
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model resnet5", "there is no 'resnet5'. Did you mean 'resnet"),
        ("--model nowhere:make", "nowhere cannot be imported"),
        ("--model math:sqrt", "--model: math:sqrt failed: TypeError"),
        ("--model builtins:dict", "must return an nn.Module; got dict"),
        ("--model own_nets.py:Net", "a module is meant, as in own_nets:Net"),
        ("--model builtins:dictt", "no function or class 'dictt'. Did you mean 'dict'?"),
        ("--image 3,32", "--image takes channels, height and width"),
        ("--hardware none.toml", "--hardware names none.toml, and there is no such file"),
        ("--precision float8", "precision"),
    ],
)
def test_the_command_says_what_is_wrong(
    run_cli: Cli, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert run_cli(f"plan {arguments}") == 2
    assert message in capfd.readouterr().err
