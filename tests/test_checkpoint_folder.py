"""A folder of checkpoints: what is kept, what is gone on from, and what no end of a process breaks."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fdg_cuda
from fdg_cuda import checkpoint_file, files, tensor_file
from fdg_cuda.checkpoint import CheckpointFolder
from fdg_cuda.checkpoint_file import Checkpoint, file_name, load_checkpoint
from fdg_cuda.errors import CheckpointError
from fdg_cuda.files import replacing
from tests.forks import end_of, fork

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def tensors(step: int) -> dict[str, Tensor]:
    return {"weights": torch.full((500,), float(step)), "counts": torch.arange(step % 7)}


def metric(step: int) -> float:
    return (step * 37 % 101) / 100


def save(checkpoints: CheckpointFolder, step: int) -> Path:
    return checkpoints.save(step, tensors(step), {"step": step}, metric=metric(step))


def consistent(checkpoint: Checkpoint | None) -> int:
    """The step of ``checkpoint``, all of which belongs to that step."""
    assert checkpoint is not None
    step = checkpoint.step
    expected = tensors(step)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[key], expected[key]) for key in expected)
    assert checkpoint.state == {"step": step}
    assert checkpoint.metric == metric(step)
    return step


def steps(folder: Path) -> set[int]:
    """Of all files there, which have to be checkpoints."""
    found = {checkpoint_file.step_in(path.name) for path in folder.iterdir()}
    assert None not in found, sorted(path.name for path in folder.iterdir())
    return {step for step in found if step is not None}


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# -- which is the latest, which the best, which are kept --------------------------------------------


def test_a_folder_is_made_filled_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "of today"
    checkpoints = CheckpointFolder(str(folder))
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    assert not folder.exists(), "looking makes no folder"
    path = save(checkpoints, 123)
    assert path == folder / "checkpoint-000000123.safetensors"
    assert consistent(checkpoints.latest()) == 123
    assert consistent(checkpoints.load(path)) == 123
    assert consistent(load_checkpoint(path)) == 123
    assert checkpoints.best() == path


@settings(max_examples=40)
@given(
    metrics=st.lists(
        st.sampled_from([None, math.nan, -math.inf, -1.0, 0.0, 0.5, math.inf]), max_size=9
    ),
    keep=st.integers(1, 3),
    restarts=st.booleans(),
)
def test_the_last_few_and_the_best_are_kept(
    tmp_path_factory: pytest.TempPathFactory,
    metrics: list[float | None],
    keep: int,
    restarts: bool,
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    checkpoints = CheckpointFolder(folder, keep=keep)
    best: int | None = None
    highest = -math.inf
    for step, value in enumerate(metrics):
        if restarts:
            checkpoints = CheckpointFolder(folder, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", lambda descriptor: None)
            path = checkpoints.save(step, {}, {}, metric=value)
        assert path.exists()
        if value is not None and (value > highest or (best is None and value == highest)):
            best, highest = step, value
        kept = set(range(max(0, step + 1 - keep), step + 1))
        assert steps(folder) == kept | ({best} - {None})
        assert checkpoints.best() == (None if best is None else folder / file_name(best))


def test_steps_are_ordered_as_numbers_beyond_nine_digits(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    for step in (0, 999_999_999, 1_000_000_000, 10_000_000_000):
        checkpoints.save(step, {}, {})
    assert steps(tmp_path) == {1_000_000_000, 10_000_000_000}
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 10_000_000_000


def test_one_step_saved_again_replaces_its_file(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(5, {}, {"first": True}, metric=1.0)
    path = save(checkpoints, 5)
    assert consistent(checkpoints.latest()) == 5
    assert steps(tmp_path) == {5}
    flip_last_byte(path)
    with pytest.raises(CheckpointError):
        checkpoints.load(path)
    assert checkpoints.best() is None
    save(checkpoints, 5)
    assert checkpoints.best() == path, "it is good again"


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    others = {
        "weights.safetensors",
        "checkpoint-1.safetensors",
        "checkpoint-0000000001.safetensors",
        "checkpoint-000000001.safetensors.bak",
        "checkpoint-٠٠٠٠٠٠٠٠١.safetensors",
        ".notes.part",
    }
    for name in others:
        (tmp_path / name).write_text("mine")
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    assert checkpoints.latest() is None
    for step in (1, 2):
        checkpoints.save(step, {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {*others, file_name(2)}


@pytest.mark.parametrize(
    ("keep", "kind"), [(0, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError)]
)
def test_a_keep_that_cannot_work_is_refused(
    tmp_path: Path, keep: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="keep must be"):
        CheckpointFolder(tmp_path, keep=keep)


def test_a_step_that_cannot_be_is_refused(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "folder")
    with pytest.raises(ValueError, match="step must be 0 or more batches; got -1"):
        checkpoints.save(-1, {}, {})
    assert not (tmp_path / "folder").exists()


def test_the_error_is_public() -> None:
    assert fdg_cuda.CheckpointError is CheckpointError


# -- what is damaged --------------------------------------------------------------------------------


def test_a_damaged_latest_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    paths = [save(checkpoints, step) for step in (1, 2, 3)]
    flip_last_byte(paths[2])
    paths[1].write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="fdg_cuda"):
        assert consistent(CheckpointFolder(tmp_path).latest()) == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert str(paths[2]) in told[0]
    assert "checksum" in told[0]
    assert str(paths[1]) in told[1]
    assert "is empty" in told[1]
    assert all(f"passed over: the newest good one is {paths[0].name}." in line for line in told)


def test_none_good_is_an_error_not_a_new_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    for step in (1, 2):
        flip_last_byte(save(checkpoints, step))
    with pytest.raises(
        CheckpointError, match=r"holds 2 checkpoint\(s\), none of which is good"
    ) as raised:
        CheckpointFolder(tmp_path).latest()
    assert str(tmp_path / file_name(2)) in str(raised.value)
    assert caplog.text.count("passed over: none here is good") == 2
    (tmp_path / file_name(1)).unlink()
    (tmp_path / file_name(2)).unlink()
    (tmp_path / file_name(3)).mkdir()
    with pytest.raises(CheckpointError, match="is no file"):
        checkpoints.latest()


def test_what_is_known_to_be_damaged_does_not_count_as_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.ones(1)}, {}, metric=float(step))
    flip_last_byte(tmp_path / file_name(2))  # its header still reads well
    restarted = CheckpointFolder(tmp_path, keep=2)
    latest = restarted.latest()
    assert latest is not None
    assert latest.step == 1
    assert restarted.best() == latest.path
    restarted.save(3, {}, {}, metric=0.0)
    assert steps(tmp_path) == {1, 2, 3}, "1 and 3 are kept, 2 is left for its owner to look at"
    restarted.save(4, {}, {}, metric=0.0)
    restarted.save(5, {}, {}, metric=0.0)
    assert steps(tmp_path) == {1, 2, 4, 5}, "1 is the best of the good ones"


def test_a_truncated_one_does_not_count_even_unread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.ones(1)}, {}, metric=float(step))
    os.truncate(tmp_path / file_name(2), 300)
    with caplog.at_level(logging.WARNING, logger="fdg_cuda"):
        assert checkpoints.best() == tmp_path / file_name(1)
        assert checkpoints.best() == tmp_path / file_name(1)
    assert [str(tmp_path / file_name(2)) in each.getMessage() for each in caplog.records] == [True]


def test_later_checkpoints_of_another_run_are_not_mixed_with(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    save(checkpoints, 10)
    save(checkpoints, 20)
    for refuse in (lambda: checkpoints.prepare(0), lambda: save(checkpoints, 15)):
        with pytest.raises(CheckpointError, match="is of a later step than") as raised:
            refuse()
        assert str(tmp_path / file_name(20)) in str(raised.value)
    assert steps(tmp_path) == {10, 20}
    checkpoints.prepare(20)


def test_training_goes_on_below_damaged_later_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(CheckpointFolder(tmp_path), 10)
    flip_last_byte(save(CheckpointFolder(tmp_path), 20))
    with caplog.at_level(logging.WARNING, logger="fdg_cuda"):
        save(CheckpointFolder(tmp_path), 15)
    assert any(str(tmp_path / file_name(20)) in each.getMessage() for each in caplog.records)
    assert consistent(CheckpointFolder(tmp_path).latest()) == 15
    save(CheckpointFolder(tmp_path), 20)
    assert consistent(CheckpointFolder(tmp_path).latest()) == 20


# -- writing that fails, or is stopped --------------------------------------------------------------


@pytest.fixture
def two_saved(tmp_path: Path) -> Iterator[CheckpointFolder]:
    """Steps 1 and 2 in tmp_path; after the test they are the same, and nothing else is there."""
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    save(checkpoints, 1)
    save(checkpoints, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 1 + (metric(1) > metric(2))
    yield checkpoints
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["os.fsync", "os.replace", "half of the file"])
def test_a_full_disk_leaves_what_was_there(
    two_saved: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    if at == "half of the file":
        bytes_of = tensor_file._bytes_of
        parts = iter([bytes_of, no_space])
        monkeypatch.setattr(tensor_file, "_bytes_of", lambda tensor: next(parts)(tensor))
    else:
        monkeypatch.setattr(at, no_space)
    with pytest.raises(OSError, match="No space left") as raised:
        save(two_saved, 3)
    assert raised.value.errno == errno.ENOSPC


def test_a_limit_on_the_size_of_files_leaves_what_was_there(two_saved: CheckpointFolder) -> None:
    def beyond_the_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match="File too large"):
            two_saved.save(3, {"weights": torch.zeros(5000)}, {})
        assert consistent(two_saved.latest()) == 2

    assert end_of(fork(beyond_the_limit)) == 0


def test_an_interrupt_leaves_what_was_there(
    two_saved: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_file, "_bytes_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(two_saved, 3)


def test_a_folder_that_cannot_be_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = CheckpointFolder(tmp_path / "file" / "folder")
    with pytest.raises(NotADirectoryError):
        save(checkpoints, 1)


def test_what_cannot_be_removed_is_told_and_does_not_stop_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    old = checkpoints.save(1, {}, {})
    unlink = Path.unlink

    def held(path: Path, missing_ok: bool = False) -> None:
        if path == old:
            raise PermissionError(errno.EPERM, "held by another")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    with caplog.at_level(logging.WARNING, logger="fdg_cuda"):
        checkpoints.save(2, {}, {})
    assert f"{old} should be removed" in caplog.text
    assert steps(tmp_path) == {1, 2}


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "folder"
    happened: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def told_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        size = os.fstat(descriptor).st_size
        happened.append(f"sync {path.name}" if path.is_dir() else f"sync file of {size} bytes")
        fsync(descriptor)

    def told_replace(source: Path, target: Path) -> None:
        happened.append(f"name {target.name}")
        replace(source, target)

    def told_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            happened.append(f"remove {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr("os.fsync", told_fsync)
    monkeypatch.setattr("os.replace", told_replace)
    monkeypatch.setattr(Path, "unlink", told_unlink)
    checkpoints = CheckpointFolder(folder, keep=1)
    sizes = [checkpoints.save(step, {}, {}).stat().st_size for step in (1, 2)]
    assert happened == [
        "sync new",
        f"sync {tmp_path.name}",
        f"sync file of {sizes[0]} bytes",
        f"name {file_name(1)}",
        "sync folder",
        f"sync file of {sizes[1]} bytes",
        f"name {file_name(2)}",
        "sync folder",
        f"remove {file_name(1)}",
    ]


# -- kill -9 ----------------------------------------------------------------------------------------


def best_until(step: int) -> int:
    return max(range(1, step + 1), key=metric)


def check_after_kill(folder: Path, keep: int) -> int:
    """What a restarted run finds is whole; the step it goes on from."""
    restarted = CheckpointFolder(folder, keep=keep)
    step = consistent(restarted.latest())
    assert restarted.best() == folder / file_name(best_until(step))
    for path in folder.glob("checkpoint-*"):
        consistent(load_checkpoint(path))
    return step


def lines_run(work: Callable[[], object], at_line: Callable[[int], None]) -> None:
    """Do ``work``, and call ``at_line`` before each line is run that may touch the disk."""
    writing = (tensor_file.write, CheckpointFolder.save, CheckpointFolder._remove_old)
    codes = {function.__code__ for function in writing}
    count = itertools.count()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != files.__file__ and frame.f_code not in codes:
            return None
        if event == "line":
            at_line(next(count))
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)


@pytest.mark.usefixtures("no_thread_left")
def test_a_kill_before_any_line_of_a_save_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # of no use to a kill, and slow
    before = tmp_path / "before"
    made = CheckpointFolder(before, keep=2)
    for step in (1, 2, 3):
        save(made, step)

    def save_and_die_at(line: int, folder: Path) -> None:
        def at_line(current: int) -> None:
            if current == line:
                os.kill(os.getpid(), signal.SIGKILL)

        lines_run(lambda: save(CheckpointFolder(folder, keep=2), 4), at_line)

    found, left_over = [], 0
    for line in itertools.count():
        folder = tmp_path / str(line)
        shutil.copytree(before, folder)
        child = fork(lambda line=line, folder=folder: save_and_die_at(line, folder))
        status = end_of(child)
        found.append(check_after_kill(folder, keep=2))
        left_over += bool(list(folder.glob(".*")))
        save(CheckpointFolder(folder, keep=2), 5)
        assert steps(folder) == {found[-1], 5, best_until(5)}, "temporary files are gone"
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert set(found) == {3, 4}
    assert found == sorted(found), "there is one moment from which on the new one is found"
    assert left_over > 10, "many kills came while the file was written"


@pytest.mark.usefixtures("no_thread_left")
def test_kills_at_any_moment_of_a_training_break_nothing(tmp_path: Path) -> None:
    """Each killed process goes on from what the one before it left."""
    rng = random.Random(0)
    save(CheckpointFolder(tmp_path, keep=2), 1)

    def train(ready: int) -> None:
        checkpoints = CheckpointFolder(tmp_path, keep=2)
        start = consistent(checkpoints.latest())
        os.write(ready, b"!")
        for step in itertools.count(start + 1):
            save(checkpoints, step)

    reached = [1]
    for _ in range(25):
        receiver, sender = os.pipe()
        child = fork(lambda sender=sender: train(sender))
        os.close(sender)
        assert os.read(receiver, 1) == b"!"
        os.close(receiver)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
        reached.append(check_after_kill(tmp_path, keep=2))
    assert reached == sorted(reached)
    assert reached[-1] > 25
    save(CheckpointFolder(tmp_path, keep=2), reached[-1] + 1)
    assert len(steps(tmp_path)) <= 4


# -- two processes ----------------------------------------------------------------------------------


def test_a_temporary_file_in_use_is_left_to_its_process(tmp_path: Path) -> None:
    path = tmp_path / file_name(1)
    with replacing(path) as mine:
        mine.write_text("half")
        assert end_of(fork(lambda: save(CheckpointFolder(tmp_path), 1))) == 0
        assert consistent(load_checkpoint(path)) == 1
        assert mine.read_text() == "half"
        with replacing(path) as other:
            assert other != mine
            other.write_text("other")
        mine.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stale_temporary_file_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    def die_half_way() -> None:
        with replacing(tmp_path / file_name(1)) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(fork(die_half_way)) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.prepare(0)
    assert not list(tmp_path.iterdir())


def test_a_file_of_any_name_is_rid_of_its_own_stale_temporaries_only(tmp_path: Path) -> None:
    path = tmp_path / "losses[1].csv"
    mine, others = tmp_path / f".{path.name}.01ab.part", tmp_path / ".losses1.csv.01ab.part"
    mine.touch()
    others.touch()
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert set(tmp_path.iterdir()) == {path, others}


def test_a_temporary_file_lost_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take it for stale in between."""
    flock = files.fcntl.flock
    lost = []

    def lose_the_first(descriptor: int, operation: int) -> None:
        if not lost:
            lost.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            lost[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", lose_the_first)
    with replacing(tmp_path / file_name(1)) as temporary:
        assert len(lost) == 1
        assert list(tmp_path.iterdir()) == [temporary]
        assert temporary != lost[0]


def test_two_processes_that_save_at_once_both_succeed(tmp_path: Path) -> None:
    def save_many() -> None:
        for _ in range(30):
            save(CheckpointFolder(tmp_path), 7)

    children = [fork(save_many), fork(save_many)]
    assert [end_of(child) for child in children] == [0, 0]
    assert steps(tmp_path) == {7}
    assert consistent(CheckpointFolder(tmp_path).latest()) == 7


def test_without_locks_nothing_is_taken_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    left = tmp_path / f".{file_name(1)}.0123abcd.part"
    left.write_text("of whom?")
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    path = save(CheckpointFolder(tmp_path), 2)
    assert set(tmp_path.iterdir()) == {left, path}
    monkeypatch.undo()
    CheckpointFolder(tmp_path).prepare(2)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_synced_stops_nothing_where_that_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    code = errno.EINVAL

    def of_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", of_files_only)
    save(CheckpointFolder(tmp_path), 1)
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        save(CheckpointFolder(tmp_path), 2)
