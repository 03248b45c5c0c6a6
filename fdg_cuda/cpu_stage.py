"""A stage on the CPU: its stream is a thread, and mail is handed over by reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fdg_cuda._core import FlatSgd, Work, end_idle_openmp_threads
from fdg_cuda.backward_weights import BackwardWeights
from fdg_cuda.gradients import UpdateRule
from fdg_cuda.hops import Errors, take_gradients
from fdg_cuda.hyper import HyperTable
from fdg_cuda.layout import INBOX_HALVES, Step
from fdg_cuda.nested import Nested
from fdg_cuda.precision import Precision
from fdg_cuda.randomness import RandomState, drawing_from, seed_stage
from fdg_cuda.schedule import Kind
from fdg_cuda.stage import Stage


class CpuStage(Stage):
    """Its forward and backward run on its own thread.

    Args:
        alone: whether it is the only one. Then its random numbers begin where torch's own generator
            stands, as in plain training.

    Attributes:
        generator: where its layers' random numbers come from.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[nn.Module],
        slots: int,
        *,
        mode: BackwardWeights,
        rule: UpdateRule,
        precision: Precision,
        alone: bool,
    ) -> None:
        super().__init__(
            index,
            layers,
            slots,
            mode=mode,
            rule=rule,
            precision=precision,
            device=torch.device("cpu"),
        )
        self._alone = alone
        self.generator = torch.Generator()
        self._seeded_from: int | None = None
        # Wiring, set by the runner.
        self.below: CpuStage | None = None
        self.above: CpuStage | None = None
        self.inputs: dict[int, Nested] = {}  # stage 0: batches that entered, by number
        self._sgd: FlatSgd | None = None
        self._takes_turns = False
        # Mail: what the neighbours sent, and what this stage is about to send.
        self._activations: list[Nested] = [None] * INBOX_HALVES
        self._incoming_errors: list[Errors | None] = [None] * INBOX_HALVES
        self._output: Nested = None
        self._errors: Errors | None = None

    def begin_fit(self, *, hyper: HyperTable, threads: int, takes_turns: bool = False) -> None:
        """Lay the parameters out anew if they changed, and make the native update.

        Args:
            threads: it computes with.
            takes_turns: other stages have the same cores when it has done its part.
        """
        self.lay_out_anew()
        self._takes_turns = takes_turns and threads > 1
        self._seed_generator()
        options = self._updates.begin_fit(hyper)
        if self._updates.native:
            self._sgd = self.memory.cpu_sgd(hyper.table, threads, **options)

    def _seed_generator(self) -> None:
        """Later fits go on where the one before ended, unless the user seeded torch anew.

        The seed tells, not where the generator stands: every ``iter`` of a DataLoader draws from it.
        """
        seed = torch.default_generator.initial_seed()
        if self._seeded_from == seed:
            return
        self._seeded_from = seed
        if self._alone:
            # Not torch's own itself: what the loader draws meanwhile would come between.
            self.generator.set_state(torch.default_generator.get_state())
        else:
            seed_stage(self.generator, seed, self.index)

    def end_fit(self) -> None:
        super().end_fit()
        self._sgd = None

    def end_epoch(self) -> None:
        super().end_epoch()
        self.inputs.clear()
        self._activations = [None] * INBOX_HALVES
        self._incoming_errors = [None] * INBOX_HALVES
        self._output = self._errors = None

    def random_state(self) -> RandomState:
        return (self.generator.get_state(),)

    def set_random_state(self, state: RandomState) -> None:
        (own,) = state
        self.generator.set_state(own)
        if self._sgd is None:  # between two fits: the next one goes on from here
            self._seeded_from = torch.default_generator.initial_seed()

    @property
    def is_first(self) -> bool:
        return self.below is None

    def work(self, step: Step) -> Callable[[int], None] | Work | None:
        work = self._work(step)
        computes = step.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)
        if not (self._takes_turns and computes) or work is None or isinstance(work, Work):
            return work
        return partial(_leaving_the_cores, work)

    def _work(self, step: Step) -> Callable[[int], None] | Work | None:
        slot = step.slot
        copy = slot if self._stash else 0
        match step.kind:
            case Kind.FORWARD:
                return partial(self._draw_own, self._forward, slot, copy)
            case Kind.BACKWARD:
                return partial(self._draw_own, self._backward, slot, copy)
            case Kind.SEND_ACTIVATION:
                return self._send_activation
            case Kind.SEND_ERROR:
                return self._send_error
            case Kind.COPY_WEIGHTS:
                if not self._stash or not self.memory.parameters:
                    return None
                if self._sgd is None:
                    return partial(self._copy_weights, step.source, slot)
                return self._sgd.copy(step.source, slot)
            case Kind.UPDATE:
                if not self.memory.parameters:
                    return None
                source = step.source if self._stash else 0
                if self._updates.in_python:
                    return partial(self._update, source, copy, 0)
                if self._takes_turns:
                    return partial(self.native_sgd.run_update, source, copy)
                return self.native_sgd.update(source, copy)
            case _:
                raise ValueError(f"a stage on the CPU has no part in a {step.kind}")

    def _draw_own(
        self, compute: Callable[[int, int, int], None], slot: int, copy: int, batch: int
    ) -> None:
        with drawing_from(self.generator):
            compute(slot, copy, batch)

    @property
    def native_sgd(self) -> FlatSgd:
        """The fused update of the running fit."""
        assert self._sgd is not None, "begin_fit comes first"
        return self._sgd

    def _update_natively(self, source: int, copy: int, row: int, batch: int) -> None:
        self.native_sgd.run_update(source, copy, batch)

    def _take_input(self, batch: int) -> Nested:
        if self.below is None:
            return self.inputs.pop(batch)
        half = batch % INBOX_HALVES
        activation = self._activations[half]
        assert activation is not None, f"no activation of batch {batch} at stage {self.index}"
        self._activations[half] = None
        return activation

    def _take_errors(self, batch: int) -> Errors | None:
        half = batch % INBOX_HALVES
        errors = self._incoming_errors[half]
        self._incoming_errors[half] = None
        return errors

    def _pass_up(self, slot: int, batch: int, output: Nested) -> None:
        self._output = output

    def _pass_down(self, batch: int, leaves: Sequence[Tensor]) -> None:
        self._errors = take_gradients(leaves)

    def _send_activation(self, batch: int) -> None:
        assert self.above is not None
        self.above._activations[batch % INBOX_HALVES] = self._output
        self._output = None

    def _send_error(self, batch: int) -> None:
        assert self.below is not None
        self.below._incoming_errors[batch % INBOX_HALVES] = self._errors
        self._errors = None


def _leaving_the_cores(work: Callable[[int], None], batch: int) -> None:
    """The idle threads of stages that take turns would slow each other down: see csrc/cpu/openmp.h."""
    try:
        work(batch)
    finally:
        end_idle_openmp_threads()
