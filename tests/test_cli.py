"""The command line: what it says to wrong input, help, and imports it does not make."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from commands import MLP, Cli, environment

from fdg_cuda import cli
from fdg_cuda.options import options_of
from fdg_cuda.settings import Settings


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ("--model resnet21", "resnet20, resnet32"),
        ("--data digit", "Did you mean 'digits'"),
        ("--data cifar10", "--download"),
        ("--devices cpu,,cpu", "cpu,cpu or 0,1"),
        ("--devices gpu", "use 'cpu'"),
        ("--devices 99,99", "--devices "),
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
        ("--out occupied/out", "--out occupied/out cannot be made: Not a directory; name another"),
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


def test_every_setting_is_an_option_under_its_heading(
    run_cli: Cli, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run_cli("train --help") == 0
    panels = re.split(r"\n╭─ ", capfd.readouterr().out)
    for entry in options_of(Settings).values():
        (panel,) = (panel for panel in panels if panel.startswith(f"{entry.panel} "))
        (line,) = (line for line in panel.splitlines() if f" {entry.flag} " in line)
        assert entry.help in line
        default = entry.auto or (entry.shown and f"({entry.shown})") or entry.default
        default = entry.flag[2:] if default is True else default
        assert (default in (None, False)) or f"[default: {default}]" in line


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


def test_capture_cuts_inside_of_layers(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    devices = ",".join(["cpu"] * 5)  # for four children
    assert run_cli(f"train --model mlp --devices {devices} --epochs 1 --capture --out out") == 0
    assert "cut at piece" in capfd.readouterr().out
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["capture"] is True
    assert len(settings["split"]) == 4
    assert run_cli("evaluate out") == 0
    assert run_cli("plan --model mlp --batch-size 8 --devices cpu,cpu --capture --out plan") == 0
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["layers"] > 4
