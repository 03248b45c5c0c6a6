"""Settings files: what they may hold, what is said of mistakes, and runs that are repeated from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import MLP, Cli, metrics

from fdg_cuda.cli_settings import Given
from fdg_cuda.settings import Settings

WANTED = Settings(
    model="mlp",
    devices=("cpu", 1),
    milestones=(2, 4),
    nesterov=True,
    lr=1e-3,
    graphs="on",
    lr_schedule_args={"step_size": 30},
)
TOML = """
model = "mlp"
devices = ["cpu", 1]
milestones = [2, 4]
split = "auto"
nesterov = true
lr = 1e-3
graphs = "on"
[lr-schedule-args]
step_size = 30
"""
YAML = """
model: mlp  # in YAML 1.1, `on` is a truth value and 1e-3 a text
devices: cpu,1
milestones: "2,4"
nesterov: true
lr: 1e-3
graphs: on
threads: null
lr_schedule_args: {step_size: 30}
"""
JSON = """
{"model": "mlp", "devices": "cpu,1", "milestones": [2, 4], "nesterov": true, "lr": 0.001,
 "graphs": "on", "lr-schedule-args": "{\\"step_size\\": 30}"}
"""


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.YML", YAML), ("a.json", JSON)]
)
def test_the_same_settings_in_every_kind_of_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert Settings.from_file(tmp_path / name) == WANTED


@pytest.mark.parametrize("name", ["a.toml", "a.yaml"])
def test_an_empty_file_gives_the_defaults(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# nothing yet\n")
    assert Settings.from_file(tmp_path / name) == Settings()


def test_one_number_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("devices: 0\nmilestones: 7\n")
    settings = Settings.from_file(tmp_path / "a.yaml")
    assert (settings.devices, settings.milestones) == ((0,), (7,))


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'epoch = 4\nbatchsize = 3\nlr = "fast"\nepochs = 2.5\nseed = -1\n'
        'batch-size = 1\nbatch_size = 2\nbacward-weights = "stash"\n'
        "lr-schedule-args = {at = 2024-01-01}\n"
    )
    with pytest.raises(ValueError, match="has 8 mistakes") as error:
        Settings.from_file(path)
    message = str(error.value)
    assert message.startswith(f"{path} has 8 mistakes: ")
    for said in (
        "'epoch' is no setting. Did you mean 'epochs'?",
        "'batchsize' is no setting. Did you mean 'batch_size'?",
        "'lr' takes a number; got 'fast'.",
        "'epochs' takes a whole number of at least 1; got 2.5.",
        "'seed' takes a whole number between 0 and 2**63 - 1; got -1.",
        "'batch_size' is there twice, with - and with _.",
        "'bacward-weights' is no setting. Did you mean 'backward-weights'?",
        "'lr-schedule-args' takes a JSON object",
    ):
        assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.ini", b"", r"\.toml, \.yaml, \.yml, \.json; got .*a\.ini"),
        ("a.toml", b"lr = ", r"a\.toml cannot be understood: .*[Ii]nvalid"),
        ("a.toml", b"lr = 1\nlr = 2", "cannot be understood: .*"),
        ("a.yaml", b"lr: [", "cannot be understood: .*"),
        ("a.yaml", b"lr: 1\nlr: 2", "cannot be understood: 'lr' is there twice"),
        ("a.yaml", b"lr: !!python/object:os.system {}", "cannot be understood: .*"),
        ("a.yaml", b"? {a: 1}\n: 2", "cannot be understood: "),
        ("a.yaml", b"nesterov: yes", "'nesterov' takes true or false; got 'yes'"),
        ("a.yaml", b"3: 4", "3 is no setting"),
        ("a.json", b'{"lr": 1, "lr": 2}', "cannot be understood: 'lr' is there twice"),
        ("a.json", b"", r"a\.json cannot be understood"),
        ("a.json", b"[1]", "must hold names of settings with their values; got list"),
        ("a.json", b"[]", "must hold names of settings with their values; got list"),
        ("a.yaml", b"false", "must hold names of settings with their values; got bool"),
        ("a.toml", b"lr = '\xff'", "cannot be understood: .*utf-8"),
        ("a.json", b"[" * 100_000, "cannot be understood: "),
        ("a.json", b'{"settings": {"lr": 1}}', "'settings' is no setting"),
    ],
)
def test_files_that_cannot_be_understood(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Settings.from_file(tmp_path / name)


# -- on the command line --------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which training would begin, which it does not."""
    seen: list[Settings] = []

    def prepare(given: Given) -> None:
        seen.append(given.settings())
        raise ValueError("enough")

    monkeypatch.setattr("fdg_cuda.cli._prepare", prepare)
    return seen


def test_an_option_comes_before_the_file_and_the_file_before_the_default(
    run_cli: Cli, tmp_path: Path, prepared: list[Settings]
) -> None:
    (tmp_path / "a.toml").write_text(
        'epochs = 7\nseed = 3\nnesterov = true\nmilestones = [5]\nsplit = [2]\ndevices = "cpu,cpu"\n'
    )
    run_cli("train --config a.toml --epochs 20 --no-nesterov --milestones '' --split auto")
    run_cli("train --config a.toml")
    run_cli("train")
    assert prepared == [
        Settings(epochs=20, seed=3, milestones=(), devices=("cpu", "cpu")),
        Settings(
            epochs=7,
            seed=3,
            nesterov=True,
            milestones=(5,),
            split=(2,),
            devices=("cpu", "cpu"),
        ),
        Settings(),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 3\nepoch = 1", "a.toml has 2 mistakes"),
        (None, "--config names a.toml, and there is no"),
    ],
)
def test_a_file_with_mistakes_is_one_line_and_no_run(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    text: str | None,
    words: str,
) -> None:
    if text is not None:
        (tmp_path / "a.toml").write_text(text)
    assert run_cli("train --config a.toml") == 2
    errors = capfd.readouterr().err
    assert words in errors
    assert "a.toml" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_file_that_cannot_be_read_is_one_of_config(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").mkdir()
    assert run_cli("train --config a.toml") == 2
    assert "--config names a.toml, which cannot be read: Is a directory" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["devices = 3", "devices = [3]", 'devices = "3"'])
def test_a_number_of_stages_is_no_list_of_devices(
    run_cli: Cli,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.setattr("fdg_cuda.accelerator.Accelerator.count", lambda _: 0)
    (tmp_path / "a.toml").write_text(text)
    assert run_cli("train --config a.toml") == 2
    errors = capfd.readouterr().err
    assert "one device per stage: for 3 stages such as cpu,cpu,cpu" in errors
    assert "For stages on the processor: --devices cpu." in errors


@pytest.mark.parametrize(
    "options",
    [
        "--milestones '' --seed 3",
        "--lr-schedule StepLR --lr-schedule-args '{\"step_size\": 1}' --nesterov",
    ],
)
def test_settings_json_repeats_its_run(run_cli: Cli, tmp_path: Path, options: str) -> None:
    assert run_cli(f"{MLP} --epochs 2 --out first {options}") == 0
    assert run_cli("train --config first/settings.json --out again") == 0
    first, again = tmp_path / "first", tmp_path / "again"
    weights = (first / "weights.safetensors").read_bytes()
    assert (again / "weights.safetensors").read_bytes() == weights
    assert [row["lr"] for row in metrics(again)] == [row["lr"] for row in metrics(first)]
    assert record(again)["settings"] == {**record(first)["settings"], "out": "again"}
    assert Settings.from_file(first / "settings.json").command() == record(first)["command"]


def record(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    return written
