"""Whether two runs of the training command are the same but for where they are kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fdg_cuda.names import counted
from fdg_cuda.options import options_of
from fdg_cuda.settings import WITHOUT_EFFECT, Settings

# Where the folder of the results says what they are those of.
RECORD = "settings.json"


def with_effect(settings: Settings) -> dict[str, Any]:
    """Those that decide what is trained, as JSON gives them back. The cut is the runner's to compare."""
    return _with_effect(json.loads(json.dumps(asdict(settings))))


def _with_effect(settings: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*WITHOUT_EFFECT, "split")
    return {name: value for name, value in settings.items() if name not in left_out}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What is not the same in an earlier run's settings, for people; empty: nothing is."""
    table = options_of(Settings)
    # A setting that is newer than the earlier run had its default.
    theirs = {**{name: table[name].default for name in ours.keys() - theirs.keys()}, **theirs}
    return "; ".join(
        f"{table[name].flag if name in table else name} was {_word(theirs.get(name))} and is "
        f"{_word(ours.get(name))} now"
        for name in dict.fromkeys((*table, *theirs))  # the model first, which decides others
        if theirs.get(name) != ours.get(name)
    )


def other_run(folder: Path, settings: Settings) -> str:
    """What is in ``folder``, if files of it would be lost to a run with ``settings``: those of a run
    with others. Empty: there are none, or such a run gives the same files again, or no epoch of theirs
    was finished."""
    file = folder / RECORD
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    try:
        record = json.loads(text)
        theirs, epochs = record["settings"], int(record["epochs_finished"])
        ours, earlier = with_effect(settings), _with_effect(theirs)
        if settings.split is not None:
            ours["split"], earlier["split"] = list(settings.split), theirs["split"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{file}, which is no record of a run"
    others = differences(ours, earlier)
    if not (epochs and others):
        return ""
    return f"a run of {counted(epochs, 'epoch')} with other settings ({others})"


def check_folder(folder: Path, settings: Settings) -> None:
    """Raises:
    ValueError: files in it would be lost; see :func:`other_run`.
    """
    found = other_run(folder, settings)
    if found:
        raise ValueError(
            f"{folder} holds {found}: name another folder with --out, or replace it with --overwrite"
        )


def free_folder(folder: Path, settings: Settings) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, ... where nothing would be lost."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([folder], others) if not other_run(each, settings))


def _word(value: Any) -> str:
    """A setting as JSON has it, as on a command line if it is a list."""
    return (",".join(map(str, value)) or "''") if isinstance(value, list) else str(value)
