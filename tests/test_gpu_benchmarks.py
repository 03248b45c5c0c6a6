"""``benchmarks.gpu`` and ``benchmarks.gpu_learning`` as a whole, on the CPU and tiny nets."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import gpu, gpu_learning, gpu_rounds
from benchmarks.device_clock import Deadline
from benchmarks.gpu_report import Report, missing
from benchmarks.gpu_rounds import Effort, Ratio, take_turns
from benchmarks.gpu_trials import BpTrial, FdgTrial, Span, Task, Trial
from benchmarks.green_contexts import (
    SIGNATURES,
    Driver,
    GreenContextError,
    Resource,
    green_groups,
    group_size,
)
from benchmarks.reports import gpu as gpu_section
from benchmarks.reports import gpu_learning as learning_section
from benchmarks.reports import markdown
from fdg_cuda.errors import NonFiniteLossError

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY = Task("mlp", "float32", torch.device("cpu"), batch_size=4, image_size=4)
PNG = b"\x89PNG"


def run(out: Path, *arguments: str) -> dict[str, Any]:
    gpu.main(["--device", "cpu", "--out", str(out), *arguments])
    return read(out / "gpu.json")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gpu")
    run(folder)
    torch.set_num_threads(threads)
    return folder


def test_every_section_is_measured_or_says_why_not(whole: Path) -> None:
    report = read(whole / "gpu.json")
    assert report["errors"] == {}
    assert report["skipped"] == dict.fromkeys(("green", "resnet56-compiled"), gpu.NEEDS_CUDA)
    assert {*report["sections"], *report["skipped"]} == {section.name for section in gpu.PLAN}
    assert report["environment"]["torch"] == torch.__version__


def test_the_cases_of_a_net(whole: Path) -> None:
    section = read(whole / "gpu.json")["sections"]["resnet56-float32"]
    assert section["errors"] == {}
    assert list(section["cases"]) == ["bp eager", *(f"fdg K={k} eager" for k in (4, 3, 2))]
    for name, case in section["cases"].items():
        assert case["ms_per_step"]["q1"] <= case["ms_per_step"]["median"]
        assert case["ms_per_step"]["n"] == section["rounds"] == 2
        assert case["samples_per_s"]["median"] > 0
        if name.startswith("fdg"):
            assert len(case["split"]) + 1 == int(name[6])
    assert [ratio["to"] for ratio in section["ratios"]] == ["bp eager"] * 3


def test_pictures_and_at_most_eight_files(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        "gpu.json", "gpu_steps.png", "timeline.json", "timeline.png",
    ]  # fmt: skip
    for name in ("gpu_steps.png", "timeline.png"):
        assert (whole / name).read_bytes().startswith(PNG)


def test_the_update_beside_a_copy(whole: Path) -> None:
    sizes = read(whole / "gpu.json")["sections"]["update"]["sizes"]
    for measured in sizes.values():
        assert set(measured["cases"]) == {"fdg fused", "copy", "torch fused", "torch foreach"}
        assert measured["cases"]["copy"]["share_of_copy"]["median"] == 1


def test_the_readme_would_show_it(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "RESULTS", whole)
    text = "\n".join(gpu_section.section())
    assert "| fdg K=4 eager |" in text
    assert "at least 0.9" in text
    assert "green: needs a CUDA device" in text


def test_a_section_that_raises_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: gpu.Run, deadline: Deadline) -> dict[str, Any]:
        raise ValueError("the third wheel came off")

    plan = list(gpu.PLAN)
    plan[0] = gpu.Section(plan[0].name, 0, 10, broken)
    monkeypatch.setattr(gpu, "PLAN", plan)
    report = run(tmp_path, "--cases", f"{plan[0].name},update")
    assert "the third wheel came off" in report["errors"][plan[0].name]
    assert list(report["sections"]) == ["update"]


def test_a_rerun_keeps_what_it_does_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, "--cases", "update")
    second = run(tmp_path, "--cases", "timeline")
    assert second["sections"]["update"] == first["sections"]["update"]
    assert "timeline" in second["sections"]
    third = run(tmp_path, "--cases", "update")
    assert third["sections"]["update"] != first["sections"]["update"]
    monkeypatch.setattr("benchmarks.gpu_report.environment", lambda: dict.fromkeys("abc"))
    assert Report(tmp_path, {}).sections == {}


def test_half_a_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text('{"environment": {')
    assert list(run(tmp_path, "--cases", "update")["sections"]) == ["update"]


def test_a_section_without_time_is_listed(tmp_path: Path) -> None:
    report = run(tmp_path, "--cases", "update", "--minutes", "0.0001")
    assert report["skipped"] == {"update": "no time left"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--out"),
        (["--out", "x", "--device", "cpu", "--cases", "updates"], "no section 'updates'"),
        (["--out", "x", "--device", "cpu", "--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_arguments_that_cannot_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_a_section_that_hangs_is_left_behind(tmp_path: Path) -> None:
    report, gone_on = Report(tmp_path, {}), threading.Event()
    watchdog = gpu.Watchdog("green", 0.01, report, gone_on.set)
    assert gone_on.wait(10)
    watchdog.stop()
    assert "did not end within" in report.errors["green"]
    assert "test_gpu_benchmarks.py" in report.errors["green"]


class Counting(Trial):
    """Takes as long as it is told, and may fail."""

    def __init__(self, order: list[str], name: str, fails_at: int = -1) -> None:
        super().__init__(TINY)
        self._order, self._name, self._fails_at = order, name, fails_at
        self.closed = False

    def span(self, steps: int) -> Span:
        self._order.append(self._name)
        if self._order.count(self._name) == self._fails_at:
            raise RuntimeError(f"{self._name} broke")
        return Span(2.0 if self._name == "b" else 1.0, 3.0)

    def close(self) -> None:
        self.closed = True


EFFORT = Effort(0.0, (2, 2), 3)


def test_cases_take_turns_and_a_broken_one_is_left_out() -> None:
    order: list[str] = []
    makers = {
        "a": lambda: Counting(order, "a"),
        "b": lambda: Counting(order, "b"),
        "c": lambda: Counting(order, "c", fails_at=4),
        "d": lambda: Counting(order, "d", fails_at=1),
    }
    ratios = [Ratio("b", "a", 0.5), Ratio("d", "a")]
    result = take_turns(makers, ratios, EFFORT, Deadline(1000), TINY)
    assert order[7:] == ["a", "b", "c", "a", "b", "c", "a", "b"]
    assert result["rounds"] == 3
    assert [ratio["median"] for ratio in result["ratios"]] == [2.0]
    assert list(result["cases"]) == ["a", "b"]
    assert {name: text.splitlines()[-1] for name, text in result["errors"].items()} == {
        "c": "RuntimeError: c broke",
        "d": "RuntimeError: d broke",
    }


def test_there_is_one_round_whatever_the_time() -> None:
    order: list[str] = []
    makers = {"a": lambda: Counting(order, "a")}
    assert take_turns(makers, [], EFFORT, Deadline(0.5), TINY)["rounds"] == 1
    late = take_turns(makers, [], EFFORT, Deadline(-1), TINY)
    assert late["errors"] == {"a": gpu_rounds.NO_TIME}


@pytest.mark.usefixtures("no_thread_left")
def test_trials_end_and_say_what_broke() -> None:
    for trial in (BpTrial(TINY, "eager"), FdgTrial(TINY, 2, graphs=False)):
        for _ in range(2):
            span = trial.span(2)
            assert span.step_s > 0
            assert span.wall_s > 0
        trial.close()
    trial = FdgTrial(TINY, 2, graphs=False)
    trial._batches = [(torch.full((4, 3, 4, 4), torch.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(NonFiniteLossError):
        trial.span(2)
    trial.close()


def test_what_failed_inside_a_section_is_named() -> None:
    groups = {"K=2": {"error": "a\nGreenContextError: cuInit returned 100 (NO_DEVICE)\n"}}
    nets = {"errors": {"bp compiled": "trace\nRuntimeError: no compiler"}}
    sections = {"green": {"groups": groups}, "nets": nets}
    assert missing({"sections": sections, "skipped": {"update": "no time left"}, "errors": {}}) == {
        "update": "no time left",
        "green K=2": "GreenContextError: cuInit returned 100 (NO_DEVICE)",
        "nets, bp compiled": "RuntimeError: no compiler",
    }


# -- green contexts -------------------------------------------------------------------------------


class PretendedDriver:
    """A driver of a card with 132 multiprocessors, as far as the calls here go."""

    def __init__(self, refuses: str = "") -> None:
        self.calls: list[str] = []
        self._handle = 0
        for name in SIGNATURES:
            setattr(self, name, PretendedCall(self, name, 801 if name == refuses else 0))

    def act(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append(name)
        if name == "cuDeviceGetDevResource":
            sm = arguments[1]._obj.of.sm
            sm.sm_count, sm.min_partition, sm.alignment = 132, 8, 8
        if name == "cuDevSmResourceSplitByCount":
            for part in arguments[0]:
                part.of.sm.sm_count = arguments[5]
        if name in ("cuDevResourceGenerateDesc", "cuGreenCtxCreate", "cuGreenCtxStreamCreate"):
            self._handle += 1
            arguments[0]._obj.value = self._handle
        if name == "cuGetErrorName":
            arguments[1]._obj.value = b"CUDA_ERROR_NOT_SUPPORTED"


class PretendedCall:
    def __init__(self, driver: PretendedDriver, name: str, code: int) -> None:
        self._driver, self._name, self._code = driver, name, code

    def __call__(self, *arguments: Any) -> int:
        if self._code == 0:
            self._driver.act(self._name, arguments)
        return self._code


def test_the_structures_have_the_drivers_size() -> None:
    assert ctypes.sizeof(Resource) == 144
    assert Resource.of.offset == 96


@pytest.mark.parametrize(("count", "size"), [(2, 64), (3, 40), (4, 32)])
def test_equal_groups_whose_streams_end(count: int, size: int) -> None:
    library = PretendedDriver()
    with green_groups(count, driver=Driver(library)) as groups:
        assert groups.whole == 132
        assert groups.sizes == [size] * count
        assert len(set(groups.streams)) == count
        assert "cuGreenCtxDestroy" not in library.calls
    assert library.calls[-2 * count :] == ["cuStreamDestroy_v2", "cuGreenCtxDestroy"] * count


def test_a_refusal_names_the_call_and_what_it_returned() -> None:
    library = PretendedDriver(refuses="cuGreenCtxCreate")
    with (
        pytest.raises(GreenContextError, match=r"cuGreenCtxCreate returned 801 \(CUDA_ERROR_NOT"),
        green_groups(2, driver=Driver(library)),
    ):
        pass


def test_groups_too_small_for_the_card() -> None:
    assert group_size(132, 3, 8, 1) == 44
    with pytest.raises(GreenContextError, match="the least is 8"):
        group_size(24, 4, 8, 2)


# -- learning -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("learning")
    gpu_learning.main(["--device", "cpu", "--out", str(folder)])
    return folder


def test_every_way_is_trained(learned: Path) -> None:
    results = read(learned / "gpu_learning.json")
    assert results["errors"] == {}
    assert len(results["runs"]) == len(gpu_learning.WAYS) == 7
    assert all(0 <= row["test_error"]["mean"] < 0.9 for row in results["summary"].values())
    assert results["summary"]["bp"]["above_bp"]["mean"] == 0
    assert (learned / "gpu_learning.png").read_bytes().startswith(PNG)


def test_finished_runs_are_not_trained_again(
    learned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = learned / "gpu_learning.json"
    before = read(file)
    missing = "fdg K=2 beta=1 seed=0"
    file.write_text(json.dumps({**before, "runs": {
        key: run for key, run in before["runs"].items() if key != missing
    }}))  # fmt: skip
    trained = []
    plain = gpu_learning.Study.train

    def watched(self: gpu_learning.Study, *arguments: Any) -> dict[str, Any]:
        trained.append(arguments[0].name)
        return plain(self, *arguments)

    monkeypatch.setattr(gpu_learning.Study, "train", watched)
    gpu_learning.main(["--device", "cpu", "--out", str(learned)])
    assert trained == ["fdg K=2 beta=1"]
    after = read(file)
    assert after["plan"] == before["plan"]
    same = [row["test_error"] for row in after["runs"][missing]["epochs"]]
    assert same == [row["test_error"] for row in before["runs"][missing]["epochs"]]


def test_as_many_epochs_as_fit() -> None:
    costs = {"bp": (3.0, 1.0), "fdg": (3.0, 1.0)}
    epochs = gpu_learning.planned_epochs(costs, 300)
    assert epochs == 40
    assert gpu_learning.SEEDS * 2 * gpu_learning.cost_of_run((3.0, 1.0), epochs) <= 300
    assert gpu_learning.planned_epochs(costs, 0) == 1


def test_the_readme_shows_what_was_learnt(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "RESULTS", learned)
    assert "| `fdg K=4 beta=0.5` |" in "\n".join(learning_section.section())
