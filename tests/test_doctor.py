"""What ``doctor`` says."""

from __future__ import annotations

import sys

import pytest
import torch
from commands import Cli

from fdg_cuda import _core, doctor, reference


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


@pytest.mark.parametrize("threads", [0, 2])
def test_doctor_says_where_updates_have_one_thread(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "openmp_threads", lambda: threads)
    found = [finding for finding in doctor._findings() if finding.subject == "openmp"]
    assert [finding.state for finding in found] == ([] if threads else ["no"])


def test_doctor_goes_on_after_a_package_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    findings = {finding.subject: finding for finding in doctor._findings()}
    assert findings["torchvision"].state == "no"
    assert "cannot be downloaded" in findings["torchvision"].text
    assert findings["self-test"].state == "ok"
