"""Everything that decides how training goes on, at a point where the pipeline is drained.

Tensors have names with a prefix: ``model.`` those of the model's own ``state_dict``, ``buffer.`` its
non-persistent buffers, ``optimizer.`` what the optimizer keeps per parameter, ``random.`` the states
of the stages' generators, ``data.`` what decides the order of the data, ``losses`` of all batches so
far. The rest is plain JSON values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fdg_cuda.callbacks import Callback, with_state
from fdg_cuda.data_state import DataState
from fdg_cuda.epoch import RunningEpoch
from fdg_cuda.errors import CheckpointError
from fdg_cuda.loss_scale import LossScale
from fdg_cuda.metrics import EpochResult, History
from fdg_cuda.optim import DelayedOptimizer
from fdg_cuda.plain import from_plain, to_plain
from fdg_cuda.stage import Stage

logger = logging.getLogger("fdg_cuda")

MOST_NAMED = 5  # parameters in one message

Tensors = dict[str, Tensor]


@dataclass
class Parts:
    """What a ``fit`` is made of, as far as it has a state.

    Attributes:
        recipe: what must be the same when training goes on: method, stages, split, modes.
        stages: there once the model is cut.
        loader: its ``state_dict`` and ``load_state_dict`` are used if it has both.
    """

    recipe: Callable[[], Mapping[str, Any]]
    model: nn.Module
    stages: Callable[[], Sequence[Stage]]
    optimizer: DelayedOptimizer
    loss_scale: LossScale | None
    lr_scheduler: Any
    loader: Any
    callbacks: Sequence[Callback]
    history: History


class TrainingState:
    """Collects and applies the state of ``parts``.

    The order of the data is kept as the states at two moments of the epoch that is trained: before its
    callbacks are told of it, and just before its iterator is made. When the epoch goes on, both are
    lived through again, and what was trained is passed over.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._moments: dict[str, DataState] = {}  # of this epoch so far
        self._to_restore: dict[str, DataState] = {}
        # Hyper-parameters as the first `fit` of the run found them.
        self._began_with = _plain_groups(parts.optimizer)

    # -- the data's order -----------------------------------------------------------------------

    def before_epoch(self) -> None:
        """The callbacks are about to be told of an epoch."""
        self._at("epoch")

    def before_reading(self) -> None:
        """The loader is about to be asked for an epoch's iterator; the first epoch's may be wanted
        before all else, to measure the layers."""
        self._at("reading")

    def after_passing_over(self) -> None:
        """The trained batches of the epoch that goes on were passed over."""
        now = self._to_restore.pop("now", None)
        if now is not None:
            now.restore_random(self._parts.loader)

    def after_epoch(self) -> None:
        """All batches of an epoch were trained; what was drawn for it is past."""
        self._moments.clear()

    def _at(self, moment: str) -> None:
        state = self._to_restore.pop(moment, None)
        if state is not None:
            state.restore(self._parts.loader)
        self._moments[moment] = self._now()

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """What is drawn in the block leaves no trace."""
        before = self._now()
        try:
            yield
        finally:
            before.restore_random(self._parts.loader)

    def _now(self) -> DataState:
        stages = self._parts.stages()
        ordinals = {s.device.index for s in stages if s.device.type == "cuda"}
        return DataState.now(self._parts.loader, ordinals)

    # -- collecting -----------------------------------------------------------------------------

    def check(self) -> None:
        """Before the first batch: what the caller gave can be kept. (The loader's own state is looked
        at where its iterator is made; asking for it may move it.)

        Raises:
            TypeError: the state of a scheduler or callback, or a setting, holds what a file cannot.
        """
        self._given()

    def collect(self, epoch: RunningEpoch, epochs: int) -> tuple[Tensors, dict[str, Any]]:
        """The state with ``epoch`` under way, or about to begin, out of ``epochs``.

        Raises:
            TypeError: the state of a scheduler, loader or callback holds what a file cannot.
        """
        parts = self._parts
        tensors: Tensors = {
            f"model.{key}": value.detach()
            for key, value in parts.model.state_dict().items()
            if isinstance(value, Tensor)
        }
        tensors.update({f"buffer.{n}": b for n, b in _hidden_buffers(parts.model).items()})
        names = _parameter_names(parts.model)
        kept: dict[str, list[str]] = {}
        plain_values: dict[str, Any] = {}
        for stage in parts.stages():
            for parameter, values in stage.optimizer_state().items():
                name = names[id(parameter)]
                kept[name] = sorted(values)
                for key, value in values.items():
                    where = f"optimizer.{name}.{key}"
                    if isinstance(value, Tensor):
                        tensors[where] = value
                    else:
                        plain_values[where] = to_plain(value, where)
            for number, each in enumerate(stage.random_state()):
                tensors[f"random.stage{stage.index}.{number}"] = each
        moments = {**self._moments, "now": self._now()}
        for moment, data in moments.items():
            tensors.update({f"data.{moment}.{n}": t for n, t in data.to_tensors().items()})
        tensors["losses"] = torch.tensor(parts.history.batch_losses, dtype=torch.float64)
        state = {
            **self._given(),
            "epochs": epochs,
            "epoch": epoch.number,
            "finished": epoch.number >= epochs,
            "running_epoch": epoch.state_dict(),
            "history": [to_plain(asdict(result), "history") for result in parts.history.epochs],
            "optimizer": {"keys": kept, "values": plain_values},
            "loss_scale": None if parts.loss_scale is None else parts.loss_scale.state_dict(),
            "loader": {moment: data.loader for moment, data in moments.items()},
        }
        return tensors, state

    def _given(self) -> dict[str, Any]:
        """What the caller gave, as it is now."""
        parts, scheduler = self._parts, self._parts.lr_scheduler
        return {
            "recipe": self._recipe(),
            "model_extra": {
                key: to_plain(value, f"the model's state {key!r}")
                for key, value in parts.model.state_dict().items()
                if not isinstance(value, Tensor)
            },
            "param_groups": _plain_groups(parts.optimizer),
            "began_with": self._began_with,
            "group_of": parts.optimizer.names_and_groups(parts.model),
            "lr_scheduler": None
            if scheduler is None
            else {
                "kind": type(scheduler).__name__,
                "state": to_plain(scheduler.state_dict(), "the state of lr_scheduler"),
            },
            "callbacks": [
                {
                    "kind": type(callback).__name__,
                    "state": to_plain(
                        callback.state_dict(), f"the state of callback {type(callback).__name__}"
                    ),
                }
                for callback in with_state(parts.callbacks)
            ],
        }

    def _recipe(self) -> dict[str, Any]:
        return {name: to_plain(value, name) for name, value in self._parts.recipe().items()}

    # -- applying -------------------------------------------------------------------------------

    def check_callbacks(self, state: dict[str, Any]) -> None:
        """Ask the callbacks whether what they kept fits, before anything is applied. Callbacks of other
        kinds than there were are not asked; :meth:`apply` refuses those.

        Raises:
            CheckpointError: one of them refuses it.
        """
        callbacks = with_state(self._parts.callbacks)
        for callback, kept in zip(callbacks, state["callbacks"], strict=False):
            if kept["kind"] == type(callback).__name__:
                callback.check_state(from_plain(kept["state"]))

    def apply(self, tensors: Tensors, state: dict[str, Any]) -> RunningEpoch:
        """Go back to what :meth:`collect` saw; returns the epoch to go on with.

        Raises:
            CheckpointError: the state belongs to a run of another kind.
        """
        parts = self._parts
        _check_same(state["recipe"], self._recipe())
        self._check_kinds(state)
        _check_dtypes(tensors, parts.model)
        _check_groups(state["group_of"], parts.optimizer.names_and_groups(parts.model))
        weights: dict[str, Any] = _under("model.", tensors)
        weights.update({key: from_plain(value) for key, value in state["model_extra"].items()})
        try:
            parts.model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"it is of another model: {_differences(weights, parts.model) or error}"
            ) from error
        with torch.no_grad():
            for name, buffer in _hidden_buffers(parts.model).items():
                if f"buffer.{name}" in tensors:
                    buffer.copy_(tensors[f"buffer.{name}"])
        for stage in parts.stages():
            stage.load_optimizer_state(self._optimizer_state(stage, tensors, state["optimizer"]))
            own = _under(f"random.stage{stage.index}.", tensors)
            stage.set_random_state(tuple(own[str(number)] for number in range(len(own))))
        self._load_groups(state["param_groups"], state["began_with"])
        if parts.loss_scale is not None:  # the precision, and with it this, is the recipe's
            parts.loss_scale.load_state_dict(state["loss_scale"])
        if parts.lr_scheduler is not None:
            parts.lr_scheduler.load_state_dict(from_plain(state["lr_scheduler"]["state"]))
        for callback, kept in zip(with_state(parts.callbacks), state["callbacks"], strict=True):
            callback.load_state_dict(from_plain(kept["state"]))
        parts.history.batch_losses.extend(tensors["losses"].tolist())
        parts.history.epochs.extend(
            EpochResult(**from_plain(result)) for result in state["history"]
        )
        epoch = RunningEpoch(state["epoch"])
        epoch.load_state_dict(state["running_epoch"])
        moments = {
            moment: DataState.from_tensors(_under(f"data.{moment}.", tensors), loader)
            for moment, loader in state["loader"].items()
        }
        moments["now"].check(parts.loader)
        if "reading" not in moments:  # so nothing was drawn for the epoch but by callbacks
            moments = {"epoch": moments.get("epoch", moments["now"])}
        self._to_restore = moments
        return epoch

    def _load_groups(
        self, kept: Sequence[dict[str, Any]], began_with: Sequence[dict[str, Any]]
    ) -> None:
        """Take the checkpoint's hyper-parameters, as torch does. Whoever gave others hears of it: those
        that neither the run began with nor are in force in the checkpoint."""
        groups = self._parts.optimizer.param_groups
        if len(kept) != len(groups):
            raise CheckpointError(
                f"it was written with {len(kept)} parameter groups, but this runner has "
                f"{len(groups)}; make it with the same ones"
            )
        given, self._began_with = self._began_with, list(began_with)
        overruled = [
            f"{name} of parameter group {number} is {values[name]!r}, not {mine[name]!r}"
            for number, (values, first, mine) in enumerate(
                zip(kept, began_with, given, strict=True)
            )
            for name in mine
            if name in values and mine[name] not in (values[name], first.get(name))
        ]
        if overruled:
            logger.warning(
                "training goes on with the checkpoint's hyper-parameters, not with those given now: %s. "
                "To change one, set it in runner.optimizer.param_groups in on_fit_start of a callback",
                "; ".join(overruled),
            )
        for group, values in zip(groups, kept, strict=True):
            for name, value in values.items():
                present = group.get(name)
                if isinstance(present, Tensor):
                    present.fill_(value)
                else:
                    group[name] = from_plain(value)

    def _optimizer_state(
        self, stage: Stage, tensors: Tensors, kept: dict[str, Any]
    ) -> dict[nn.Parameter, dict[str, Any]]:
        own = {id(parameter) for layer in stage.layers for parameter in layer.parameters()}
        states: dict[nn.Parameter, dict[str, Any]] = {}
        for name, parameter in self._parts.model.named_parameters():
            if id(parameter) in own and name in kept["keys"]:
                places = {key: f"optimizer.{name}.{key}" for key in kept["keys"][name]}
                states[parameter] = {
                    key: tensors[where] if where in tensors else from_plain(kept["values"][where])
                    for key, where in places.items()
                }
        return states

    def _check_kinds(self, state: dict[str, Any]) -> None:
        parts = self._parts
        kept = state["lr_scheduler"]
        theirs = None if kept is None else kept["kind"]
        ours = None if parts.lr_scheduler is None else type(parts.lr_scheduler).__name__
        if theirs != ours:
            raise CheckpointError(
                f"it was written with lr_scheduler {theirs or 'None'}, but this fit has "
                f"{ours or 'None'}; give the same"
            )
        theirs_all = [callback["kind"] for callback in state["callbacks"]]
        ours_all = [type(callback).__name__ for callback in with_state(parts.callbacks)]
        if theirs_all != ours_all:
            raise CheckpointError(
                f"of callbacks that have a state it was written with "
                f"{', '.join(theirs_all) or 'none'}, but this fit has {', '.join(ours_all) or 'none'}; "
                f"give the same, in the same order"
            )


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _hidden_buffers(model: nn.Module) -> Tensors:
    """Buffers that ``state_dict`` leaves out."""
    shown = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in shown}


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {
            name: to_plain(value, f"{name!r} of a parameter group")
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def _differences(weights: Mapping[str, Any], model: nn.Module) -> str:
    """The first few of what torch would list in full: a wall for a model of some size."""
    entries = model.state_dict()
    different = [f"{name} is new" for name in entries if name not in weights]
    different += [f"{name} is no more" for name in weights if name not in entries]
    different += [
        f"{name} was of shape {tuple(weights[name].shape)} and is of {tuple(entry.shape)} now"
        for name, entry in entries.items()
        if isinstance(entry, Tensor)
        and isinstance(weights.get(name), Tensor)
        and weights[name].shape != entry.shape
    ]
    more = len(different) - MOST_NAMED
    return "; ".join(different[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _check_dtypes(tensors: Tensors, model: nn.Module) -> None:
    """torch would convert them without a word."""
    entries = {f"model.{key}": value for key, value in model.state_dict().items()}
    entries.update({f"buffer.{name}": buffer for name, buffer in _hidden_buffers(model).items()})
    for key, value in entries.items():
        theirs = tensors.get(key)
        if isinstance(value, Tensor) and theirs is not None and theirs.dtype != value.dtype:
            raise CheckpointError(
                f"{key.split('.', 1)[1]} was {theirs.dtype} and is {value.dtype} now; convert the model "
                f"to what it was (model.float(), model.double())"
            )


def _check_groups(theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    """Of the parameters that both know: one that was frozen when a runner was made may be unknown."""
    different = [
        f"{name} was in parameter group {theirs[name]} and is in {ours[name]} now"
        for name in theirs
        if name in ours and theirs[name] != ours[name]
    ]
    if different:
        shown = "; ".join(different[:MOST_NAMED])
        more = "; ..." if len(different) > MOST_NAMED else ""
        raise CheckpointError(f"{shown}{more}. Divide the parameters as they were (param_groups)")


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [
        f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r} now"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        raise CheckpointError(
            f"it was written by a run of another kind: {'; '.join(different)}. Make the runner as it "
            f"was, or start anew in another folder"
        )
