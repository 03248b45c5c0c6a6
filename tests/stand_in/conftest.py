"""Loads the extension that is linked against the stand-in for the CUDA runtime.

``tests/test_stand_in.py`` builds it and runs this folder in a process of its own; without it there is
nothing here to collect.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

CORE = os.environ.get("FDG_STAND_IN_CORE")

if CORE is None:
    collect_ignore_glob = ["test_*.py"]
else:
    spec = importlib.util.spec_from_file_location("fdg_cuda._core", CORE)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["fdg_cuda._core"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fdg_cuda._core"])


@pytest.fixture(autouse=True)
def stand_in() -> Iterator[Any]:
    """The stand-in's state; a test fails if the runtime was misused or anything leaked."""
    from stand_in_accelerator import StandIn

    from fdg_cuda import _core
    from fdg_cuda.accelerator import accelerator, use_accelerator

    state = _core.stand_in_state()
    state.reset()
    alive = dict(state.alive)  # what an earlier test that failed left
    before = accelerator()
    use_accelerator(StandIn())
    try:
        yield state
    finally:
        use_accelerator(before)
    assert state.violations == []
    assert {kind: n - alive.get(kind, 0) for kind, n in state.alive.items()} == dict.fromkeys(
        state.alive, 0
    )
