"""A recorded forward as a chain of pieces: between which of its calls it can be cut, what crosses a
cut, and the stages that cuts make."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import nn

from fdg_cuda.call_form import InputForm
from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.graph_stage import Carried, GraphStage, Stretch
from fdg_cuda.names import first_of
from fdg_cuda.torch_facts import keeps_state
from fdg_cuda.trace import Call, ModuleCall, Ref, TensorInfo, Trace, leaves, sizes_needed

CutPoint = int | str


@dataclass(frozen=True)
class Crossing:
    """A tensor that crosses a cut. ``sizes_only``: an empty one, of shape (0, *sizes), goes in place
    of a tensor whose sizes alone are still asked for."""

    info: TensorInfo
    sizes_only: bool

    @property
    def nbytes(self) -> int:
        """Bytes; of a batch of two samples, if the model was captured with more."""
        return 0 if self.sizes_only else self.info.nbytes


class GraphChain:
    """What :func:`fdg_cuda.capture.capture` makes of a model.

    Piece numbers count from 0; a cut is the number of the piece before which it is made. Every cut
    between two pieces is possible, in any combination.

    Attributes:
        model: the user's, whose modules and parameters the pieces use.
        form: what inputs must be like.
        whole: paths of modules that are called as a whole though they are none of torch's layers,
            and why. No cut lies inside one.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, form: InputForm, whole: Mapping[str, str]
    ) -> None:
        self.model = model
        self.form = form
        self.whole = dict(whole)
        self._trace = trace
        self._calls = trace.calls
        self._find_lifetimes()
        self._refusals: dict[int, str] = {}
        self._refuse_between()
        self._begins = self._find_begins()

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self._begins)

    def __repr__(self) -> str:
        return (
            f"GraphChain({type(self.model).__name__}: {len(self)} pieces, {len(self._calls)} calls)"
        )

    # -- what is offered --------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> list[GraphStage]:
        """The finest cut there is, to be run one behind the other: each takes what the one before gives,
        and writes into it where the model's code does. They are there to be measured: a stage copies
        what it is given and writes into; if every piece did, they would cost more than the stages they
        add up to. (So that one copy of a stage that begins so counts nowhere.)"""
        return self._cut(self.allowed_cuts(), copies=False)

    @property
    def names(self) -> list[str]:
        """For people: what each piece calls first, a module's path if it is one."""
        return [self._calls[begin].name for begin in self._begins]

    def allowed_cuts(self) -> list[int]:
        """The numbers of all pieces but the first."""
        return list(range(1, len(self)))

    def stages(self, cuts: Sequence[CutPoint]) -> list[GraphStage]:
        """The model in ``len(cuts) + 1`` stages.

        Args:
            cuts: where stages 1, 2, ... begin: piece numbers, or names of submodules that a stage
                begins with (``["layer2.0", "layer3"]``).

        Raises:
            ModelCaptureError: a cut that cannot be made, with the reason and what can.
        """
        numbers = [self.cut_at(cut) if isinstance(cut, str) else cut for cut in cuts]
        if any(a >= b for a, b in pairwise(numbers)):
            raise ModelCaptureError(f"cuts must be in the order the model runs; got {list(cuts)}")
        if any(not 1 <= number < len(self) for number in numbers):
            raise ModelCaptureError(
                f"cuts must lie between 1 and {len(self) - 1}, since the model was captured as "
                f"{len(self)} pieces and every stage needs one; got {list(cuts)}. "
                f"{self.what_forbids_cuts()}"
            )
        return self._cut(numbers, copies=True)

    def cut_at(self, name: str) -> int:
        """The piece with which the submodule ``name`` begins.

        Raises:
            ModelCaptureError: there is no such submodule, it is not run by itself, or no cut can be
                made there.
        """
        names = [path for path, _ in self.model.named_modules() if path]
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            known = f"its submodules are {first_of(names)}" if names else "it has none"
            if close:
                known = f"the nearest names are {', '.join(close)}"
            raise ModelCaptureError(f"the model has no submodule {name!r} to cut before; {known}")
        at = next((i for i, call in enumerate(self._calls) if _runs_in(call, name)), None)
        if at is None:
            raise ModelCaptureError(f"cannot cut before {name}: {self._why_not_run(name)}")
        # Views and sizes belong to the piece before.
        while at < len(self._calls) and not self._calls[at].works:
            at += 1
        if at in self._begins[1:]:
            return self._begins.index(at)
        raise ModelCaptureError(
            f"cannot cut before {name}: {self._refusals.get(at, 'it begins the model')}. "
            f"{self._nearest(at)}"
        )

    def point(self, cut: int) -> str:
        """For people: the outermost submodule that :meth:`cut_at` finds this cut by; where none begins
        there, what is called, and in which module."""
        call = self._calls[self._begins[cut]]
        named = dict(self.model.named_modules())
        for path in (*call.stack, call.name):
            if path and path in named:
                with suppress(ModelCaptureError):
                    if self.cut_at(path) == cut:
                        return path
        if call.name in named:
            return call.name if cut == 0 else f"{call.name}, used again"
        return f"{call.name} in {call.stack[-1] or 'the model'}"

    def crossing(self, cut: int) -> list[Crossing]:
        """What crosses the cut before piece ``cut``."""
        carried = self._carried(self._begins[cut])
        return [Crossing(self._trace.tensors[n], not itself) for n, itself in carried]

    def what_forbids_cuts(self) -> str:
        """Why there are not more pieces: a sentence for each cause, the one with most cuts first."""
        counts: dict[str, int] = {}
        for at, reason in self._refusals.items():
            counts[reason] = counts.get(reason, 0) + self._calls[at].works
        causes = [reason for reason, n in sorted(counts.items(), key=lambda item: -item[1]) if n][
            :3
        ]
        causes += [
            f"{path} is called as a whole: {why}" for path, why in list(self.whole.items())[:3]
        ]
        return "; ".join(causes)

    # -- lifetimes and cuts -----------------------------------------------------------------------

    def _find_lifetimes(self) -> None:
        """Where each tensor comes from, and up to where it, and its sizes, are needed."""
        count, end = len(self._trace.tensors), len(self._calls)
        self._made = [-1] * count
        self._needed = [-1] * count
        self._sizes_needed = [-1] * count
        for index, call in enumerate(self._calls):
            for number in call.results:
                self._made[number] = index
        uses = [*enumerate(call.template for call in self._calls), (end, self._trace.output)]
        for index, template in uses:
            for leaf in leaves(template):
                if isinstance(leaf, Ref):
                    self._needed[leaf.value] = index
            for size in sizes_needed(template):
                self._sizes_needed[size.value] = index

    def _carried(self, at: int) -> list[Carried]:
        """What crosses a cut before call ``at``."""
        return [
            (number, self._needed[number] >= at)
            for number, made in enumerate(self._made)
            if made < at <= max(self._needed[number], self._sizes_needed[number])
        ]

    def _refuse_between(self) -> None:
        """Note the calls before which no cut can be made."""
        users: dict[str, list[int]] = {}
        changed: set[str] = set()
        inside: set[str] = set()
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        # Sorted, so that of a layer's parameters the same one is named every time.
        for index, call in enumerate(self._calls):
            for name in sorted(call.uses, reverse=True):
                users.setdefault(name, []).append(index)
            changed |= call.changes
            if isinstance(call.target, ModuleCall):
                # Of the buffers in a module that is called as a whole there is no copy for another
                # stage.
                inside |= call.uses
        for leaf in leaves(self._trace.output):
            if hasattr(leaf, "name"):
                users.setdefault(leaf.name, []).append(len(self._calls) - 1)
        for name, indices in users.items():
            if len(indices) > 1 and name in parameters | changed | inside:
                reason = self._shared(
                    name, indices, "parameter" if name in parameters else "buffer"
                )
                self._refuse(indices, reason)
        self._refuse_shared_state()
        self._refuse_aliases()

    def _refuse(self, users: list[int], reason: str) -> None:
        for at in range(users[0] + 1, users[-1] + 1):
            self._refusals.setdefault(at, reason)

    def _refuse_shared_state(self) -> None:
        """Of what Python code keeps in a module's attributes there is no copy for another stage."""
        users: dict[int, list[int]] = {}
        names = {id(module): name for name, module in self.model.named_modules()}
        for index, call in enumerate(self._calls):
            if isinstance(call.target, ModuleCall):
                for module in self.model.get_submodule(call.target.path).modules():
                    if keeps_state(module):
                        users.setdefault(id(module), []).append(index)
        for key, indices in users.items():
            if len(indices) > 1:
                self._refuse(indices, self._shared(names[key], indices, "module"))

    def _shared(self, name: str, indices: list[int], kind: str) -> str:
        first, last = self._calls[indices[0]], self._calls[indices[-1]]
        places = f"in {first.name} ({first.place}) and in {last.name} ({last.place})"
        if first.name == last.name and first.place == last.place:
            what = (
                f"{kind} {name} is used {len(indices)} times, in a loop around {first.name} "
                f"({first.place})"
            )
        else:
            what = f"{kind} {name} is used {places}"
        unties = {
            "parameter": "x.weight = nn.Parameter(x.weight.detach().clone()) unties a parameter",
            "buffer": "x.mean = x.mean.clone() unties a buffer",
            "module": "copy.deepcopy(module)",
        }[kind]
        why = "its users must be in one stage, or each needs its own"
        if kind == "module":
            why = f"what its Python code keeps in it is for all of them: {why}"
        return f"{what}; {why} ({unties})"

    def _refuse_aliases(self) -> None:
        """A write into memory that several tensors across the cut share would be seen by one only."""
        for index, call in enumerate(self._calls):
            if len(call.mutates) < 2:
                continue
            for at in range(index, 0, -1):
                crossing = {n for n, itself in self._carried(at) if itself} & call.mutates
                if len(crossing) > 1:
                    self._refusals.setdefault(
                        at,
                        f"{call.name} ({call.place}) writes in place into memory that {len(crossing)} "
                        f"tensors across the cut share; make it work out of place (inplace=False), or "
                        f"keep what it changes in one stage with it",
                    )
                elif all(self._made[number] >= at for number in call.mutates):
                    break

    def _find_begins(self) -> list[int]:
        """The calls with which pieces begin."""
        working = [index for index, call in enumerate(self._calls) if call.works]
        begins = [0]
        for at in working[1:]:
            if at not in self._refusals and any(itself for _, itself in self._carried(at)):
                begins.append(at)
        return begins

    def _nearest(self, at: int) -> str:
        before = [begin for begin in self._begins[1:] if begin < at]
        after = [begin for begin in self._begins[1:] if begin > at]
        near = [self._described(begin) for begin in (*before[-1:], *after[:1])]
        if not near:
            return "No other cut can be made either"
        return f"The nearest cuts are before {' and '.join(near)}"

    def _described(self, begin: int) -> str:
        return f"piece {self._begins.index(begin)} ({self._calls[begin].name})"

    def _why_not_run(self, name: str) -> str:
        for path, module in self.model.named_modules():
            if path and name.startswith(path + "."):
                called = any(call.name == path for call in self._calls)
                if path in self.whole:
                    return f"it is inside {path}, which is called as a whole: {self.whole[path]}"
                if called:
                    return f"it is inside {path}, a {type(module).__name__}, which is called as a whole"
        return "it was not run on the sample"

    # -- stages -----------------------------------------------------------------------------------

    def _cut(self, numbers: Sequence[int], *, copies: bool) -> list[GraphStage]:
        """``copies``: of what comes in, wherever it is written into."""
        ends = [0, *(self._begins[number] for number in numbers), len(self._calls)]
        return [
            self._stage(k, begin, end, len(ends) - 2, copies=copies)
            for k, (begin, end) in enumerate(pairwise(ends))
        ]

    def _stage(self, k: int, begin: int, end: int, last: int, *, copies: bool) -> GraphStage:
        calls = self._calls[begin:end]
        takes = None if k == 0 else self._carried(begin)
        incoming = range(self._trace.inputs) if takes is None else [n for n, own in takes if own]
        written = frozenset().union(*(call.mutates for call in calls))
        earlier = frozenset().union(*(call.uses for call in self._calls[:begin]))
        return GraphStage(
            self.model,
            Stretch(
                calls=calls,
                takes=takes,
                gives=None if k == last else self._carried(end),
                inputs=(self.form, self._trace.inputs),
                output=self._trace.output,
                clones=[n for n in incoming if n in written] if copies else [],
                borrowed=earlier,
                ambient=self._trace.ambient,
                title=f"{type(self.model).__name__} stage {k} of {last + 1}: calls {begin}-{end - 1}",
            ),
        )


def _runs_in(call: Call, name: str) -> bool:
    paths = (*call.stack, call.name)
    return any(path == name or path.startswith(name + ".") for path in paths)
