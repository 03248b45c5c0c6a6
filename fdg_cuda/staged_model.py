"""The user's model and the stages it is cut into, as soon as it is known where."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from fdg_cuda.batches import Batches
from fdg_cuda.captured_chain import CapturedChain
from fdg_cuda.chain import check_parameters, check_shared
from fdg_cuda.checkpoints import Saver
from fdg_cuda.errors import CheckpointError
from fdg_cuda.layer_chain import LayerChain
from fdg_cuda.machine import Machine
from fdg_cuda.model_chain import ModelChain
from fdg_cuda.nested import Nested
from fdg_cuda.pipeline import LossFunction
from fdg_cuda.precision import Precision
from fdg_cuda.split import check_cuts
from fdg_cuda.stage import Stage
from fdg_cuda.uneven import CUTS_INSIDE, longest_in_means, said_of_uneven

logger = logging.getLogger("fdg_cuda")

FAR_FROM_EVEN = 1.25  # of the longest stage, in times the mean
LEAST_SECONDS = 5e-3  # of a stage; less is measured too roughly to warn of it

Model = nn.Module | Sequence[nn.Module]


def chain_of(model: Model, *, capture: bool = False) -> ModelChain:
    """``model`` as a chain: the children of an ``nn.Sequential``, the modules of a list, or what is
    captured of any other module's forward.

    Args:
        capture: of an ``nn.Sequential`` and a list, too.

    Raises:
        TypeError: neither a module that can be called nor a list of modules; or ``capture`` is no bool.
        ValueError: no layers, or a hook that stages would not call.
        ModelCaptureError: a module that could not be trained here, however it is cut.
    """
    if not isinstance(capture, bool):
        raise TypeError(f"capture must be True or False; got {capture!r}")
    if isinstance(model, nn.ModuleList) or (
        isinstance(model, Sequence) and not isinstance(model, str)
    ):
        for number, layer in enumerate(model):
            if not isinstance(layer, nn.Module):
                raise TypeError(
                    f"layer {number} of the chain is no nn.Module but a {type(layer).__name__}"
                )
        model = nn.Sequential(*model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model must be an nn.Module, or a list of modules that are called one behind the "
            f"other; got a {type(model).__name__}"
        )
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        if len(model) == 0:
            raise ValueError("the model has no layers")
        if not capture:
            return LayerChain(model)
    return CapturedChain(model)


def lay_out(chain: ModelChain, sample: Nested, precision: Precision) -> None:
    """Find the layers of ``chain`` on a batch's input.

    Raises:
        TypeError, ModelCaptureError: see :meth:`ModelChain.lay_out`.
    """
    # As the stages will run: what the model's code sets otherwise inside is found by that.
    device = next((p.device.type for p in chain.model.parameters()), "cpu")
    with precision.autocast(device):
        chain.lay_out(sample)


class StagedModel:
    """
    Args:
        chain: the model.
        machine: makes the stages.
        count: how many of them.
        split: where they are to begin; None: where that is measured to balance.
        split_points: likewise, by submodules' names.

    Attributes:
        split: where they begin; None before the model was cut.
        stages: in order; empty before.

    Raises:
        ValueError, ModelCaptureError: the model cannot be cut so.
    """

    def __init__(
        self,
        chain: ModelChain,
        machine: Machine,
        count: int,
        *,
        split: Sequence[int] | None,
        split_points: Sequence[str] | None,
    ) -> None:
        check_cuts(split, split_points, count)
        self.chain = chain
        self.split: list[int] | None = None
        self.stages: list[Stage] = []
        self._machine = machine
        self._count = count
        self._wanted: Sequence[int | str] | None = split if split_points is None else split_points
        if chain.is_laid_out:
            self._cut_as_wanted()

    @property
    def split_points(self) -> list[str] | None:
        """What begins there, for people."""
        return None if self.split is None else [self.chain.point(cut) for cut in self.split]

    def recipe(self) -> dict[str, Any]:
        """What must be the same where training goes on from a checkpoint."""
        pieces = self.chain.pieces if self.chain.is_laid_out else None
        return {"stages": self._count, "split": self.split, "pieces": pieces}

    def check(self, *, on_cpu: bool) -> None:
        """What a caller may have changed since the last ``fit``.

        Raises:
            TypeError, ValueError, RuntimeError: it cannot be trained as it is now.
        """
        self.chain.check_unchanged()
        check_parameters(self.chain.model, on_cpu=on_cpu)
        check_shared(self.chain.model, [stage.layers for stage in self.stages])

    # -- cutting --------------------------------------------------------------------------------

    def lay_out(self, sample: Nested) -> None:
        """Find the layers on a batch's input, if they are not known; and cut, if that says where.

        Raises:
            TypeError, ValueError, ModelCaptureError: the model cannot be cut as asked.
        """
        if self.chain.is_laid_out:
            return
        lay_out(self.chain, sample, self._machine.precision)
        self._cut_as_wanted()

    def cut(self, batches: Batches, loss_fn: LossFunction, saver: Saver | None) -> None:
        """Cut the model if it is not yet: as in the checkpoint that ``saver`` goes on from, else
        where times measured on the first batch balance.

        Raises:
            CheckpointError: the checkpoint cannot be gone on from.
            ModelCaptureError: the model cannot be captured, or not be cut as asked.
            CutMemoryError: no cut fits into the devices' memories.
            ValueError: too few cuts do not lie between layers that share a parameter.
        """
        kept = None if saver is None else saver.begin()
        if not self.chain.is_laid_out:
            self.lay_out(batches.first()[0])
            if kept is not None:
                batches.begin_anew()  # the loader will go on as the checkpoint says
        elif not self.stages:
            self._cut_as_wanted()  # which failed when it was laid out
        # One of other stages will be refused, with all that differs.
        if saver is not None and kept is not None and kept["stages"] == self._count:
            with saver.naming_the_checkpoint():
                self._check_pieces(kept.get("pieces"))
            if not self.stages:
                self._cut(kept["split"])
        if not self.stages:
            cut = self._machine.best_cut(self.chain, batches.first(), loss_fn)
            self._cut(cut.split)
            self._warn_if_uneven(cut.stage_seconds)

    def _warn_if_uneven(self, seconds: Sequence[float]) -> None:
        if self._machine.schedule.method == "bp":  # stages take turns, however they are cut
            return
        if max(seconds) < LEAST_SECONDS or longest_in_means(seconds) < FAR_FROM_EVEN:
            return
        logger.warning(
            "%s (cut at %s), and all wait for it: %s",
            said_of_uneven(seconds),
            ", ".join(self.split_points or []),
            CUTS_INSIDE if self.chain.has_cuts_inside else "no cut that fits is faster",
        )

    def _check_pieces(self, theirs: int | None) -> None:
        ours = self.chain.pieces
        if theirs != ours:
            was, now = (
                "cut between its children" if n is None else f"captured as {n} pieces"
                for n in (theirs, ours)
            )
            remedy = "use the versions of torch and of the model's code that wrote it"
            if None in (theirs, ours) and isinstance(self.chain.model, nn.Sequential):
                how = "without" if theirs is None else "with"
                remedy = f"make the runner {how} capture=True, as it was"
            raise CheckpointError(
                f"the model was {was} and is {now} now, so that the cut means another one. To go on, "
                f"{remedy}; or start anew in another folder and load the weights"
            )

    def _cut_as_wanted(self) -> None:
        self.chain.check_length(self._count)
        if self._wanted is not None:
            chain = self.chain
            self._cut([chain.cut_at(cut) if isinstance(cut, str) else cut for cut in self._wanted])
        elif self._count == 1:
            self._cut([])

    def _cut(self, cuts: Sequence[int]) -> None:
        parts = self.chain.parts(cuts)
        check_shared(self.chain.model, parts)
        self.split, self.stages = list(cuts), list(self._machine.make_stages(parts))
        logger.info(
            "stages begin at layers %s (%s)", [0, *cuts], ", ".join(self.split_points or [])
        )
