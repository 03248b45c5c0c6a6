"""FDGRunner: trains a model split over several devices with delayed gradients."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdg_cuda.arguments import check_backward_weights, check_fit, check_loss
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.batches import Batches, Loader
from fdg_cuda.callbacks import Callback, FunctionCallback, check_callbacks, measures_of
from fdg_cuda.chain import check_parameters
from fdg_cuda.checkpoints import Checkpoints, Saver, as_checkpoints
from fdg_cuda.devices import Device, parse_devices
from fdg_cuda.elementwise_loss import without_broadcast
from fdg_cuda.factory import Factory
from fdg_cuda.fitting import Fit
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.groups import GroupRule
from fdg_cuda.inference import evaluate, predict, predict_batches
from fdg_cuda.interpreter_end import awaited
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.loss_scale import make_loss_scale
from fdg_cuda.machines import check_options, make_machine
from fdg_cuda.metrics import (
    BatchResult,
    EpochResult,
    Evaluation,
    History,
    cross_entropy,
)
from fdg_cuda.nested import Nested
from fdg_cuda.optim import Default, DelayedOptimizer, check_scheduler, make_optimizer
from fdg_cuda.pipeline import LossFunction, Pipeline
from fdg_cuda.precision import parse_precision
from fdg_cuda.recorder import Recorder
from fdg_cuda.schedule import Schedule
from fdg_cuda.shares import Shares
from fdg_cuda.stage import Stage
from fdg_cuda.staged_model import Model, StagedModel, chain_of
from fdg_cuda.timeline import Timeline
from fdg_cuda.training_state import Parts, TrainingState
from fdg_cuda.update_measures import UpdateMeasures

logger = logging.getLogger("fdg_cuda")

CHANGES_NOTHING = ("evaluate", "predict", "state_dict")
LR, MOMENTUM, WEIGHT_DECAY = Default(0.1), Default(0.9), Default(5e-4)


class FDGRunner:
    """Trains ``model`` split into ``len(devices)`` stages, one per device, with delayed gradients.

    Args:
        model: any ``nn.Module``, or a list of modules that are called one behind the other. An
            ``nn.Sequential`` and a list are cut between their layers (or see ``capture``). Of any other
            module the forward is captured, see docs/capture.md, and cut between its calls; a batch's
            input that is a tuple or list is its positional arguments if it takes several, a dict its
            keyword arguments if these are their names.
        devices: one per stage; integers are CUDA ordinals, strings torch device names; repeats are
            allowed (``["cpu", "cpu"]``, ``[0, 0, 1, 1]``); all of one kind.
        method: ``"fdg"`` (Zhuang et al., TNNLS 2022), ``"ddg"`` (Huo et al., ICML 2018) or ``"bp"``.
        split: where stages 1, 2, ... begin: numbers of the children, or of the pieces of a captured
            model. None: where the longest stage is as short as possible, by what layers cost on the
            first batch of the first ``fit``; on CUDA devices within their memory.
        split_points: in place of ``split``, names of submodules with which stages 1, 2, ... begin:
            ``["layer2.0", "layer3"]``; of an ``nn.Sequential`` that is not captured, names of
            its children.
        capture: True: an ``nn.Sequential`` and a list are captured, too, as any other module is, and cut
            inside their children where that balances better. ``split`` then counts pieces.
        sample: a batch's input, to capture the model on now; a few samples of it do. None: the input
            of the first batch of the first ``fit``. An ``nn.Sequential`` or a list
            that is not captured needs none.
        loss_fn: ``(output, target) -> scalar``, a mean over samples; default cross-entropy.
        optimizer: makes the torch optimizer of each stage from a list of its parameters (or of groups
            of them, with ``param_groups``): ``lambda params: torch.optim.AdamW(params, lr=3e-4)``.
            None: SGD with the four arguments that follow, in a fused update.
        lr, momentum, weight_decay, nesterov: as in ``torch.optim.SGD``.
        beta: shrinking factor in (0, 1]: stage k's gradients carry ``beta ** (K-1-k)``; not in
            ``"bp"``.
        param_groups: which parameters have hyper-parameters of their own: ``(name, parameter) ->
            {"weight_decay": 0.0}`` or None, or a mapping from patterns of names (``{"*.bias": {...}}``;
            the first that matches counts) to such. Names are the model's; ``beta`` and all
            hyper-parameters of the optimizer can be overridden.
        accumulate: batches per update, which takes the mean of their gradients, and the
            hyper-parameters of the last of them. The last update of an epoch takes those that are left.
        clip_norm: scale the gradients of a stage down to this norm, all of them taken together, as
            ``torch.nn.utils.clip_grad_norm_`` does; shrunk, as they enter the update.
        clip_value: cut their elements to this magnitude; not together with ``clip_norm``.
        backward_weights: ``"stash"``: a batch's backward uses the weights of its forward (FDG, eq. 7);
            ``"current"``: those of the moment, which takes one weight copy per stage; ``"replay"``:
            those of the moment too, but the forward is run again with them (Features Replay), so that
            of a batch in flight a stage keeps its input instead of all activations. Stages without
            delay (the last one; all in ``"bp"``) need not.
        precision: ``"float32"``: every layer in the dtype it has. ``"bfloat16"``: forward and loss of
            every stage, and so ``evaluate`` and ``predict``, run under ``torch.autocast``; weights,
            their gradients and the update stay float32. ``"float16"``: likewise, and losses are scaled
            by a factor that follows the gradients; an update whose gradients are not finite is left out.
            torch's dtypes of these names are taken, too.
        initial_loss_scale: for ``"float16"``: the factor at first, a power of two; default 65536. A
            checkpoint that is gone on from brings its own.
        cpu_threads: cores that CPU stages share; default ``torch.get_num_threads()``. Each stage
            computes with ``cpu_threads // K`` of them, at least 1; ``"bp"``, whose stages take turns,
            with all.
        graphs: on CUDA devices, whether stages run as captured graphs: ``"auto"``: those that can be
            captured, ``True``: all, or an error; ``False``: none.

    The same seed gives the same bits on every run, however the stages' threads interleave. CPU stages
    draw their random numbers (dropout) from generators of their own (``stage.generator``), seeded from
    ``torch.initial_seed()`` and the stage's number; torch's own is left alone. That of a single stage
    begins where torch's own stands, as in plain training.

    Attributes:
        optimizer: ``param_groups`` that any ``torch.optim.lr_scheduler`` can drive.

    Raises:
        TypeError, ValueError: an argument that cannot work; the message says what would.
        ModelCaptureError: a model that cannot be captured, or not be cut as asked.
    """

    optimizer: DelayedOptimizer

    def __init__(
        self,
        model: Model,
        devices: Sequence[Device],
        *,
        method: str = "fdg",
        split: Sequence[int] | None = None,
        split_points: Sequence[str] | None = None,
        capture: bool = False,
        sample: Nested = None,
        loss_fn: LossFunction | None = None,
        optimizer: Factory | None = None,
        lr: float = LR,
        momentum: float = MOMENTUM,
        weight_decay: float = WEIGHT_DECAY,
        nesterov: bool = False,
        beta: float = 0.5,
        param_groups: GroupRule | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        backward_weights: str = "stash",
        precision: str | torch.dtype = "float32",
        initial_loss_scale: float | None = None,
        cpu_threads: int | None = None,
        graphs: str | bool = "auto",
    ) -> None:
        chain = chain_of(model, capture=capture)
        self._model = chain.model
        check_options(graphs, cpu_threads)
        self._precision = parse_precision(precision, self._model)
        scaled = self._precision.scales_loss
        rule = UpdateRule(accumulate, clip_norm, clip_value, optimizer, scaled)
        self._loss_scale = make_loss_scale(initial_loss_scale, scaled=scaled)
        self._devices = parse_devices(devices)
        self._schedule = Schedule(method, len(self._devices), accumulate)
        check_backward_weights(backward_weights)
        check_parameters(self._model, on_cpu=self._devices[0].type == "cpu")
        self._machine = make_machine(
            self._devices,
            self._schedule,
            BackwardWeights(backward_weights),
            rule=rule,
            precision=self._precision,
            cpu_threads=cpu_threads,
            graphs=graphs,
        )
        self._backward_weights = backward_weights
        self._rule = rule
        self._loss_fn = without_broadcast(loss_fn) if loss_fn is not None else cross_entropy
        check_loss(self._loss_fn)
        self.optimizer = make_optimizer(
            self._model,
            optimizer,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            beta=beta,
            param_groups=param_groups,
        )
        self._staged = StagedModel(
            chain, self._machine, len(self._devices), split=split, split_points=split_points
        )
        self._history: History | None = None
        self._fit: Fit | None = None  # while one is running
        self._predicting = False  # an iterator of predict_batches is not at its end
        self._recorder: Recorder | None = None  # inside a `with runner.trace()`
        if sample is not None:
            self._staged.lay_out(sample)

    # -- what the runner is ---------------------------------------------------------------------

    @property
    def split(self) -> list[int] | None:
        """Layers (children, or pieces of a captured model) at which stages 1, 2, ... begin; None
        before the model was cut, which may take the first batch."""
        return None if self._staged.split is None else list(self._staged.split)

    @property
    def split_points(self) -> list[str] | None:
        """What begins there, for people: submodules' names, or, where none begins, the function that
        is called and in which module. None before the model was cut."""
        return self._staged.split_points

    @property
    def schedule(self) -> Schedule:
        """The rule this runner follows."""
        return self._schedule

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order; empty before the model was cut."""
        return list(self._staged.stages)

    @property
    def precision(self) -> str:
        """In which the stages compute."""
        return self._precision.value

    @property
    def loss_scale(self) -> float | None:
        """What the loss of a batch that enters next is multiplied by; None but for ``"float16"``."""
        return None if self._loss_scale is None else self._loss_scale.value

    @property
    def history(self) -> History | None:
        """What the latest ``fit`` recorded, as far as it came; None before any."""
        return self._history

    @property
    def shares(self) -> Shares | None:
        """Where the time of the epoch under way went so far: stages at work, and waiting for data.
        None while no epoch is. Any thread may ask; what an action is at now does not count yet."""
        fit = self._fit
        return None if fit is None else fit.shares()

    def __repr__(self) -> str:
        devices = ", ".join(map(str, self._devices))
        return f"FDGRunner({self._schedule.method!r} on {devices}, split={self.split})"

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the model's weights and buffers, with the model's own keys, on the CPU."""
        self._refuse_while_running("state_dict")
        return {
            key: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for key, value in self._model.state_dict().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load weights and buffers saved by :meth:`state_dict` or by the plain model.

        Momentum is left as it is, as ``torch.optim.SGD`` does.

        Raises:
            RuntimeError: missing or unexpected keys, or other shapes (from torch).
        """
        self._refuse_while_running("load_state_dict")
        self._model.load_state_dict(state_dict)

    # -- training -------------------------------------------------------------------------------

    def fit(
        self,
        loader: Loader,
        epochs: int = 1,
        *,
        lr_scheduler: Any = None,
        lr_step: str = "epoch",
        on_batch: Callable[[BatchResult], object] | None = None,
        on_epoch: Callable[[EpochResult], object] | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    ) -> History:
        """Train for ``epochs`` epochs. The pipeline drains at the end of each, so that every stage
        has made one update per batch and the model's own parameters hold the finished weights.

        The model trains in the mode it is in; if it was put in evaluation mode as a whole, ``train()``
        is called first.

        Args:
            loader: any iterable of pairs (input, target); iterated once per epoch. Each is a tensor,
                or nested: tuples, lists and dicts of tensors and plain Python values, which the
                first layer and ``loss_fn`` get as they are. The first dimension of the first tensor
                in each is the batch.
            epochs: how often.
            lr_scheduler: a ``torch.optim.lr_scheduler`` made for :attr:`optimizer`, to be stepped
                here after every epoch or batch. (``ReduceLROnPlateau`` is stepped in a callback, whose
                ``state_dict`` keeps it in checkpoints; one stepped in ``on_epoch`` is not kept.)
            lr_step: ``"epoch"`` or ``"batch"``.
            on_batch: called for each batch, in order, a few ticks after its loss is known: always
                just as many, so that what it changes (a learning rate) does not depend on timing.
            on_epoch: called after each epoch, with nothing running: ``evaluate``, ``predict`` and
                ``state_dict`` may be used in it.
            callbacks: told of these and other moments, see :class:`~fdg_cuda.Callback`.
            checkpoints: where to keep what training can go on from, see
                :class:`~fdg_cuda.Checkpoints`; a folder stands for ``Checkpoints(folder)``. None
                writes none.

        Returns:
            Losses per batch, and averages per epoch.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite; the model holds the weights with which
                that epoch began (with ``every``: those of the last drain).
            TypeError, ValueError: a scheduler that cannot be stepped here; a setting or a state that
                a checkpoint cannot hold, before the first batch.
            KeyboardInterrupt: on Ctrl-C, within two ticks; every stage holds its newest weights,
                and stages may differ by the updates that were under way.
            TrainingStopped: with ``checkpoints``, on Ctrl-C or SIGTERM, after a checkpoint was
                written; a second Ctrl-C is a KeyboardInterrupt, a second SIGTERM ends the process.
            CheckpointError: ``checkpoints`` holds what cannot be gone on from, or written over, or no
                file can be made there; before the first batch.
            Exception: whatever the model, the loss or the loader raised. No thread is left, and
                ``fit`` can be called again.
        """
        self._refuse_while_running("fit")
        epochs = check_fit(epochs, lr_step)
        self._check_model()
        check_scheduler(lr_scheduler, self.optimizer)
        listeners = [FunctionCallback(on_batch, on_epoch), *check_callbacks(callbacks)]
        measures = measures_of(listeners)
        self._history = history = History()
        if epochs == 0:
            return history
        if not self._staged.chain.is_training:
            logger.info("the model was in evaluation mode; fit() puts it in training mode")
            self._model.train()
        state = saver = None
        if checkpoints is not None:
            settings = as_checkpoints(checkpoints)
            recipe = partial(self._recipe, settings.every)
            state = self._state(recipe, loader, lr_scheduler, listeners, history)
            saver = Saver(settings, state, epochs)
        batches = Batches(loader, epochs, state.before_reading if state else lambda: None)
        with awaited():
            try:
                self._staged.cut(batches, self._loss_fn, saver)
            except BaseException:
                batches.close()  # the loader's processes would else live as long as the exception
                raise
            self._fit = Fit(
                partial(self._pipeline, measures),
                batches,
                epochs,
                optimizer=self.optimizer,
                history=history,
                callbacks=listeners,
                before_epoch=self._before_epoch,
                lr_scheduler=lr_scheduler,
                lr_step=lr_step,
                state=state,
                saver=saver,
            )
            try:
                self._fit.run()
            finally:
                self._fit = None
        return history

    def _before_epoch(self) -> None:
        self._refuse_while_running("an epoch")
        self._staged.chain.check_unchanged()

    def stop(self) -> None:
        """End a running ``fit`` early: no more batches enter, those under way are trained, and ``fit``
        returns. From a callback, or from any thread; without a running ``fit`` nothing happens."""
        fit = self._fit
        if fit is not None:
            fit.stop()

    def _state(
        self,
        recipe: Callable[[], dict[str, Any]],
        loader: Loader,
        lr_scheduler: Any,
        callbacks: Sequence[Callback],
        history: History,
    ) -> TrainingState:
        return TrainingState(
            Parts(
                recipe=recipe,
                model=self._model,
                stages=lambda: self._staged.stages,
                optimizer=self.optimizer,
                loss_scale=self._loss_scale,
                lr_scheduler=lr_scheduler,
                loader=loader,
                callbacks=callbacks,
                history=history,
            )
        )

    def _recipe(self, every: int | None) -> dict[str, Any]:
        """What must be the same where training goes on from a checkpoint.

        Args:
            every: batches between two drains.
        """
        return {
            **self._staged.recipe(),
            "method": self._schedule.method,
            "backward_weights": self._backward_weights,
            "precision": self._precision.value,
            "optimizer": self.optimizer.kind,
            "accumulate": self._rule.accumulate,
            "clip_norm": self._rule.clip_norm,
            "clip_value": self._rule.clip_value,
            "every": every,
        }

    @contextmanager
    def _pipeline(
        self, measures: UpdateMeasures | None, interrupts: Interrupts
    ) -> Iterator[Pipeline]:
        pipeline = self._machine.pipeline(
            self._loss_fn, self.optimizer, interrupts, self._recorder, self._loss_scale
        )
        try:
            if measures is not None:
                pipeline.measure_updates(measures)
            yield pipeline
        finally:
            pipeline.close()

    def trace(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        ticks: int = 50,
        skip: int | None = None,
    ) -> AbstractContextManager[Timeline]:
        """Measure when every stage is at work: ``with runner.trace("out/trace.json") as timeline:``
        and ``fit`` in the block. Training does the same, to the bit.

        Args:
            path: where the block, when it is left, writes the timeline for https://ui.perfetto.dev
                or chrome://tracing; a picture is put beside it (``.png``). None: no files.
            ticks: how many ticks are recorded at most, counted over all epochs.
            skip: how many are left out before them; default: the fill and a few more.

        Returns:
            A context manager that gives a :class:`~fdg_cuda.Timeline`, filled after every epoch.

        Raises:
            TypeError, ValueError: an argument that cannot work.
            RuntimeError: entered inside another trace of this runner, or while ``fit`` is running.
            OSError: the files cannot be written.
        """
        return self._trace(Recorder(self._schedule, path, ticks=ticks, skip=skip))

    @contextmanager
    def _trace(self, recorder: Recorder) -> Iterator[Timeline]:
        if self._recorder is not None or self._fit is not None:
            where = "while fit is running" if self._fit else "inside another trace of this runner"
            raise RuntimeError(f"trace was entered {where}; use one trace at a time, around fit")
        self._recorder = recorder
        try:
            with recorder as timeline:
                yield timeline
        finally:
            self._recorder = None

    def _check_model(self) -> None:
        """What a caller may have changed since the runner was made."""
        self._staged.check(on_cpu=self._devices[0].type == "cpu")
        self.optimizer.follow(self._model)

    # -- inference ------------------------------------------------------------------------------

    def evaluate(self, loader: Loader) -> Evaluation:
        """Loss and accuracy over ``loader``, averaged over samples, in evaluation mode.

        The stages work on several batches at the same time. Changes nothing; works before any
        training (where the model is not cut into stages yet, batch after batch).

        Raises:
            TypeError, ValueError: as for ``fit``, if the loader gives no (input, target) pairs.
        """
        self._refuse_while_running("evaluate")
        self._staged.chain.check_unchanged()
        return evaluate(self._machine, self._staged.chain, loader, self._loss_fn)

    def predict(self, x: Nested) -> Nested:
        """The model's output for ``x``, an input of the chain, in evaluation mode, without gradient,
        on the device of ``x``.

        Raises:
            TypeError, ValueError: ``x`` is no tensor, nested or not, or holds no samples.
        """
        self._refuse_while_running("predict")
        self._staged.chain.check_unchanged()
        return predict(self._machine, self._staged.chain, x)

    def predict_batches(self, loader: Loader) -> Iterator[Nested]:
        """The model's outputs for the batches of ``loader``, in order, as an iterator: in evaluation
        mode, without gradient, each on the device of its input.

        The stages work on several batches at the same time, so batches are read ahead of the outputs.
        The model is in evaluation mode until the iterator has come to its end, or is closed
        (``close()``, or no longer referenced); until then ``fit`` is refused.

        Args:
            loader: yields inputs, or pairs (input, target), whose target is not used. So an input that
                is itself a tuple or list goes into a pair: ``(input, None)``.

        Raises:
            TypeError, ValueError: while iterating, where the loader gives no inputs.
        """
        self._refuse_while_running("predict_batches")
        self._staged.chain.check_unchanged()
        return self._predict_batches(loader)

    def _predict_batches(self, loader: Loader) -> Iterator[Nested]:
        self._refuse_while_running("predict_batches")
        self._predicting = True
        try:
            yield from predict_batches(self._machine, self._staged.chain, loader)
        finally:
            self._predicting = False

    def _refuse_while_running(self, what: str) -> None:
        if self._predicting and what not in CHANGES_NOTHING:
            raise RuntimeError(
                f"{what} has to wait while predict_batches is at work: come to the end of its "
                f"iterator first, or close() it"
            )
        if self._fit is not None and (self._fit.running or what == "fit"):
            raise RuntimeError(
                f"{what} was called while fit is running; use it in on_epoch, when the pipeline is "
                f"drained, or after fit"
            )
