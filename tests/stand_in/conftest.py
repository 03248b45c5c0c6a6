"""Loads the extension that is linked against the stand-in for the CUDA runtime.

``tests/test_stand_in.py`` builds it and runs this folder in a process of its own; without it there is
nothing here to collect.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "without_race_detector: it would take too long, or races are not the point"
    )


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's state; a test fails if the runtime was misused, anything leaked, or two
    accesses to the same memory were not ordered."""
    from race_detector import RaceDetector
    from stand_in_accelerator import StandIn

    from fdg_cuda import _core
    from fdg_cuda.accelerator import accelerator, use_accelerator

    state = _core.stand_in_state()
    state.reset()
    alive = dict(state.alive)  # what an earlier test that failed left
    watched = request.node.get_closest_marker("without_race_detector") is None
    races = RaceDetector() if watched else None
    name_streams(monkeypatch)
    do_not_watch_the_oracle(monkeypatch)
    before = accelerator()
    use_accelerator(StandIn(races))
    try:
        with races or nullcontext():
            yield state
    finally:
        use_accelerator(before)
    assert state.violations == []
    assert {kind: n - alive.get(kind, 0) for kind, n in state.alive.items()} == dict.fromkeys(
        state.alive, 0
    )


def name_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Violations call a pipeline's streams by their names."""
    from fdg_cuda import _core
    from fdg_cuda.cuda_pipeline import CudaPipeline

    make_fit = CudaPipeline._make_fit

    def named(self: CudaPipeline, *args: Any) -> Any:
        for index, lane in enumerate(self._lanes):
            _core.stand_in_name_stream(self._scheduler.stream_handle(index), lane.name)
        return make_fit(self, *args)

    monkeypatch.setattr(CudaPipeline, "_make_fit", named)


def do_not_watch_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no streams, and would take twice as long."""
    from torch.utils._python_dispatch import _disable_current_modes

    from fdg_cuda import reference

    train = reference.train

    def unwatched(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return train(*args, **options)

    monkeypatch.setattr(reference, "train", unwatched)
