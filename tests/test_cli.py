"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import same_bits
from matplotlib.image import imread
from safetensors import safe_open
from safetensors.torch import load_file

from fdg_cuda import FDGRunner, _core, cli, data, doctor, models, reference
from fdg_cuda.batches import Loader
from fdg_cuda.metrics import Evaluation
from fdg_cuda.settings import Settings
from fdg_cuda.train import lr_factor

ROOT = Path(__file__).resolve().parent.parent
FILES = {"metrics.csv", "curves.png", "weights.safetensors", "settings.json"}
PINNED = (
    "train --data digits --model resnet20 --devices cpu,cpu --epochs 4 --batch-size 128 --beta 0.5 "
    "--seed 7"
)
MLP = "train --model mlp --devices cpu,cpu"

Cli = Callable[[str], int]


def command(arguments: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "fdg_cuda", *shlex.split(arguments), *more]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def start(arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_files(folder: Path, model: str) -> None:
    """Every file is there, whole, and the weights are those of the plain model."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert imread(folder / "curves.png").shape[2] == 4
    plain = models.build(model, in_channels=1, num_classes=10, image_size=8)
    plain.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    json.loads((folder / "settings.json").read_text())


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Cli]:
    """Runs the command line in this process, in an empty folder; returns its exit code."""

    def run(arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fdg-cuda", *shlex.split(arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield run
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


# -- the files of a run ---------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bytes_in_two_processes(tmp_path: Path) -> None:
    for out in ("first", "second"):
        process = start(f"{PINNED} --out {out}", tmp_path)
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "test accuracy" in output
        assert output.count("samples/s") == 5, "one line per epoch, and the summary"
    first, second = ((tmp_path / out / "weights.safetensors") for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    check_files(tmp_path / "first", "resnet20")
    rows = metrics(tmp_path / "first")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["test_accuracy"]) > 0.9
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    with safe_open(first, "pt") as weights:
        stored = weights.metadata()
    assert stored["model"] == "resnet20"
    assert stored["data"] == "digits"
    assert stored["seed"] == "7"
    assert "version" in stored


def test_a_folder_is_written_over_and_its_settings_repeat_the_run(
    run_cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_cli(f"{MLP} --epochs 1 --seed 3 --out out") == 0
    assert run_cli(f"{MLP} --epochs 2 --milestones '' --out out") == 0
    before = (out / "weights.safetensors").read_bytes()
    assert len(metrics(out)) == 2
    check_files(out, "mlp")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["settings"]["split"] is not None
    assert settings["settings"]["threads"] >= 1
    words = settings["command"].removeprefix("fdg-cuda ")
    assert "--split" in words
    (out / "weights.safetensors").unlink()
    assert run_cli(words) == 0
    assert (out / "weights.safetensors").read_bytes() == before


def test_the_weights_file_scores_what_the_metrics_say(run_cli: Cli, tmp_path: Path) -> None:
    assert run_cli(f"{MLP} --epochs 1 --out out") == 0
    spec = data.load("digits")
    model = models.build("mlp", in_channels=1, num_classes=10, image_size=8).eval()
    model.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    ((x, y),) = data.BatchLoader(spec.test, len(spec.test))
    accuracy = float((model(x).argmax(1) == y).float().mean())
    assert accuracy == pytest.approx(float(metrics(tmp_path / "out")[0]["test_accuracy"]))


@pytest.mark.parametrize(
    "options",
    [
        "--method bp",
        "--method ddg --devices cpu,cpu,cpu --split 1,2",
        "--devices cpu --nesterov --threads 1",
        "--backward-weights current --channels-last --warmup-epochs 0",
    ],
)
def test_options_reach_the_run(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: str
) -> None:
    assert run_cli(f"{MLP} --epochs 1 --batch-size 256 --out out {options}") == 0
    check_files(tmp_path / "out", "mlp")
    written = json.loads((tmp_path / "out" / "settings.json").read_text())["command"]
    words = shlex.split(options)
    assert all(word in shlex.split(written) for word in words)
    assert "method" in capfd.readouterr().out


def test_the_default_folder_tells_what_was_trained(run_cli: Cli, tmp_path: Path) -> None:
    assert run_cli(f"{MLP} --epochs 1 --method bp") == 0
    check_files(tmp_path / "runs" / "digits-mlp-bp-k2", "mlp")


# -- how a run can end ----------------------------------------------------------------------------


def test_ctrl_c_writes_what_there_is(tmp_path: Path) -> None:
    process = start(f"{MLP} --epochs 100000 --out out", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert "written" in output
    check_files(tmp_path / "out", "mlp")
    rows = metrics(tmp_path / "out")
    assert len(rows) >= 1
    record = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert record["epochs_finished"] == len(rows)
    assert f"{len(rows)} of 100000 epochs were finished" in errors


def test_interrupted_files_belong_to_one_epoch(
    run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the last row of metrics.csv, not of the epoch that was broken off."""
    options = f"{MLP} --epochs 4 --milestones 9 --warmup-epochs 0 --out"
    assert run_cli(f"{options} whole --epochs 2") == 0
    evaluate = FDGRunner.evaluate
    calls = 0

    def interrupted(runner: FDGRunner, loader: Loader) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return evaluate(runner, loader)

    monkeypatch.setattr(FDGRunner, "evaluate", interrupted)
    assert run_cli(f"{options} broken") == 130
    assert len(metrics(tmp_path / "broken")) == 2
    whole, broken = (
        load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "broken")
    )
    assert same_bits(whole, broken)


@pytest.mark.parametrize("when", ["loading", "first epoch"])
def test_ctrl_c_before_an_epoch_is_finished(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if when == "loading":
        monkeypatch.setattr(data, "load", interrupt)
    else:
        monkeypatch.setattr("fdg_cuda.progress.PlainProgress.batch", interrupt)
    assert run_cli(f"{MLP} --out out") == 130
    assert "interrupted" in capfd.readouterr().err
    if when == "loading":
        assert not (tmp_path / "out").exists()
    else:
        check_files(tmp_path / "out", "mlp")
        assert metrics(tmp_path / "out") == []


def test_divergence_keeps_the_last_finite_weights(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(f"{MLP} --lr 1e9 --warmup-epochs 0 --seed 5 --out out") == 1
    errors = capfd.readouterr().err
    assert "the loss became" in errors
    assert "smaller lr" in errors
    assert len(errors.splitlines()) == 1
    check_files(tmp_path / "out", "mlp")
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    torch.manual_seed(5)
    begin = models.build("mlp", in_channels=1, num_classes=10, image_size=8).state_dict()
    assert all(torch.equal(weights[key], begin[key]) for key in begin)


def test_results_that_cannot_be_written(
    run_cli: Cli,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdg_cuda.train.write_metrics", full)
    assert run_cli(f"{MLP} --epochs 1 --out out") == 1
    assert "No space left" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ("--model resnet21", "resnet20, resnet32"),
        ("--data digit", "Did you mean 'digits'"),
        ("--data cifar10", "--download"),
        ("--devices cpu,,cpu", "cpu,cpu or 0,1"),
        ("--devices gpu", "use 'cpu'"),
        ("--devices 99", "'cpu'"),
        ("--devices cpu,cpu,cpu,cpu,cpu", "at most 4 devices"),
        ("--beta 0", "above 0 and at most 1"),
        ("--beta 1.5", "above 0 and at most 1"),
        ("--split one", "such as 3,7"),
        ("--split 4", "between 1 and 3"),
        ("--split 1,2", "name 1 of the layers"),
        ("--method gpipe", "fdg, ddg, bp"),
        ("--backward-weights old", "stash, current, replay"),
        ("--lr -1", "0 or more"),
        ("--lr-decay 0", "above 0"),
        ("--nesterov --momentum 0", "momentum above 0"),
        ("--milestones 3,2", "rising"),
        ("--milestones soon", "such as 10,15"),
        ("--warmup-epochs -1", "at least 0"),
        ("--epochs 0", "at least 1"),
        ("--batch-size 0", "at least 1"),
        ("--threads 0", "at least 1"),
        ("--seed -1", "between 0"),
        ("--out occupied", "name a folder"),
    ],
)
def test_wrong_input_is_one_line_with_the_remedy(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: str,
    remedy: str,
) -> None:
    (tmp_path / "occupied").touch()
    assert run_cli(f"{MLP} --out out {options}") == 2
    captured = capfd.readouterr()
    assert remedy in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("fdg-cuda: error: ")
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [("train --epochs many", "--epochs"), ("train --bogus", "--bogus"), ("trian", "trian")],
)
def test_a_command_line_that_cannot_be_read(
    run_cli: Cli, capfd: pytest.CaptureFixture[str], arguments: str, named: str
) -> None:
    assert run_cli(arguments) == 2
    captured = capfd.readouterr()
    assert named in captured.err
    assert captured.out == ""


# -- the learning rate ----------------------------------------------------------------------------


def test_the_learning_rate_warms_up_by_batches_and_falls_at_milestones() -> None:
    factor = lr_factor(Settings(warmup_epochs=2, milestones=(3, 4), lr_decay=10), batches=5)
    assert factor(0) == pytest.approx(0.1)
    assert factor(5) == pytest.approx(0.55)
    assert [factor(b) for b in (10, 14)] == [1, 1]
    assert [factor(b) for b in (15, 19, 20, 999)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_without_warm_up_the_rate_is_whole_from_the_first_batch() -> None:
    assert lr_factor(Settings(warmup_epochs=0, milestones=()), batches=5)(0) == 1


@pytest.mark.parametrize(
    ("epochs", "warmup", "milestones"),
    [(1, 0, ()), (2, 0, (1,)), (4, 1, (2, 3)), (20, 5, (10, 15)), (300, 5, (150, 225))],
)
def test_defaults_follow_the_number_of_epochs(
    epochs: int, warmup: int, milestones: tuple[int, ...]
) -> None:
    settings = Settings(epochs=epochs).completed(threads=3)
    assert settings.warmup_epochs == warmup
    assert settings.milestones == milestones
    assert settings.threads == 3


# -- help and doctor ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version"])
def test_help_does_not_wait_for_torch(arguments: str) -> None:
    program = (
        "import sys\n"
        "from fdg_cuda import cli\n"
        f"sys.argv = ['fdg-cuda', *{arguments.split()!r}]\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_public_names_are_there_without_being_imported_first() -> None:
    program = (
        "import fdg_cuda\n"
        "assert set(fdg_cuda.__all__) <= set(dir(fdg_cuda))\n"
        "for name in fdg_cuda.__all__:\n"
        "    assert getattr(fdg_cuda, name).__class__\n"
        "from fdg_cuda import *\n"
        "assert FDGRunner.__module__ == 'fdg_cuda.runner'\n"
        "try:\n"
        "    fdg_cuda.Runner\n"
        "except AttributeError as error:\n"
        "    assert 'Runner' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True, timeout=60)


def test_doctor_says_what_there_is(run_cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli("doctor") == 0
    output = " ".join(capfd.readouterr().out.split())
    assert torch.__version__ in output
    assert f"backends {', '.join(_core.backends)}" in output
    assert "ok device cpu" in output
    assert "OK: 12 batches on cpu,cpu" in output


def test_doctor_fails_where_training_goes_wrong(
    run_cli: Cli, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = reference.train
    monkeypatch.setattr(reference, "train", lambda *a, **k: honest(*a, **k, beta=0.51))
    assert run_cli("doctor") == 1
    output = " ".join(capfd.readouterr().out.split())
    assert "FAIL self-test ArithmeticError" in output
    assert "rebuild the extension" in output


def test_doctor_goes_on_after_a_package_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    findings = {finding.subject: finding for finding in doctor._findings()}
    assert findings["torchvision"].state == "no"
    assert "cannot be downloaded" in findings["torchvision"].text
    assert findings["self-test"].state == "ok"


def test_a_folder_without_the_extension_says_so(tmp_path: Path) -> None:
    """As in an unbuilt checkout, which hides an installed package from whoever is in it."""
    package = Path(cli.__file__).parent
    shutil.copytree(package, tmp_path / "fdg_cuda", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for command in (["-c", "from fdg_cuda import FDGRunner"], ["-m", "fdg_cuda", "doctor"]):
        done = subprocess.run(
            # Without `site` no editable installation is found before the folder.
            [sys.executable, "-S", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 1
        assert "where its extension is not built" in said
        assert "run `pip install .` there" in said
