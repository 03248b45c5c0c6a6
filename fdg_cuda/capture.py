"""Any model's forward as a chain that can be cut into stages.

The model is run on a sample and what it calls is recorded (:mod:`fdg_cuda.recording`), in training and
in evaluation mode and with another batch size: what must hold for every batch is seen to hold for
these. Where it does not, because a module's Python code looks at values, at its mode or at the number
of samples, that module is called as a whole, and asks again every time. docs/capture.md has the why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdg_cuda.alike import Difference, differences, merged
from fdg_cuda.buffers import SavedBuffers
from fdg_cuda.call_form import Arguments, InputForm
from fdg_cuda.errors import ModelCaptureError
from fdg_cuda.graph_chain import GraphChain
from fdg_cuda.nested import Nested, check_nested, cloned, map_tensors, moved, sample_count, tensors
from fdg_cuda.recording import Blocked, record
from fdg_cuda.trace import Place, Trace

logger = logging.getLogger("fdg_cuda")

# Samples that a batch is cut down to.
_FEW = 2
# Distinct sizes of a sample, beside that of the batch, that are tried out; further ones are taken to
# be fixed.
_SIZES_TRIED = 4
_BY_HAND = (
    "Move that code into a submodule, which is then called as a whole; or cut the model by hand: give "
    "a list of modules, one after another."
)


def capture(model: nn.Module, sample: Nested) -> GraphChain:
    """The forward of ``model`` as a chain.

    The model is left as it was: its modes, buffers, gradients and attributes, and the random states.
    Most of it needs a few of the batch's samples only.

    Args:
        model: any module. Its forward is run a few times on ``sample``.
        sample: a batch's input. A tuple or list of it is the positional arguments of a forward that
            takes several, a dict the keyword arguments of one with parameters of these names; all
            else is the one argument.

    Raises:
        TypeError: ``model`` is no module, or the sample is not nested of tensors.
        ModelCaptureError: the forward cannot be followed, and the line at which; the sample does not
            fit; or parameters are such as cannot be trained here.
    """
    check_capturable(model)
    check_nested(sample, "the sample")
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    if device is not None:
        sample = moved(sample, device)
    with _left_alone(model):
        few = _few_of(sample)
        if few is not None:
            try:
                chain = _captured(model, few)
                _verify(chain, sample, modes=(True,))
                return chain
            except Exception as error:  # which matters only if all samples meet it too
                logger.info("captured with all samples, since with %d of them: %s", _FEW, error)
        return _captured(model, sample)


def _few_of(sample: Nested) -> Nested | None:
    """The first samples of a batch, which take less time; None where they are all there are, or where
    it would not be clear what is a sample."""
    count = sample_count(sample)
    firsts = [len(tensor) for tensor in tensors(sample) if tensor.ndim]
    if count <= _FEW or _FEW in firsts:
        return None
    return map_tensors(lambda t: t[:_FEW] if t.ndim and len(t) == count else t, sample)


def _captured(model: nn.Module, sample: Nested) -> GraphChain:
    form = InputForm.of(model, sample)
    _warm_up(model, form, sample)
    trace, training, whole = _followed(model, form, sample)
    form.free |= _free_sizes(model, form, sample, training, frozenset(whole))
    chain = GraphChain(model, trace, form, whole)
    _verify(chain, sample)
    return chain


# -- recording until all agree --------------------------------------------------------------------


def _followed(
    model: nn.Module, form: InputForm, sample: Nested
) -> tuple[Trace, Trace, dict[str, str]]:
    """A trace that holds in both modes and for other batch sizes; the one in training mode alone; and
    why which modules are called as a whole for that."""
    whole: dict[str, str] = {}
    batch = form.batch_dims(sample)
    more = form.resized(sample, batch, sample_count(sample) + 1)
    arguments = form.call.arguments(sample)
    while True:
        opaque = frozenset(whole)
        try:
            training = _record(model, arguments, opaque, training=True)
            trace = merged(training, _record(model, arguments, opaque, training=False))
            if not isinstance(trace, Trace):
                _call_whole(
                    whole, trace, "its forward differs between training and evaluation mode"
                )
                continue
            try:
                other = _record(model, more, opaque, training=True)
            except Blocked:
                raise
            except Exception as error:  # whatever the model says to a number it cannot take
                logger.info("the model takes no other number of samples: %s", error)
                return trace, training, whole
            parted = differences(training, other)
        except Blocked as blocked:
            if blocked.final:
                raise ModelCaptureError(_said(blocked.reason, blocked.place)) from None
            _call_whole(whole, [Difference(blocked.stack, blocked.place)], blocked.reason)
            continue
        if not parted:
            form.free |= batch
            return trace, training, whole
        _call_whole(whole, parted, "its forward depends on the number of samples in the batch")


def _call_whole(whole: dict[str, str], parted: Sequence[Difference], reason: str) -> None:
    for at in parted:
        path = at.stack[-1] if at.stack else ""
        if path == "":
            raise ModelCaptureError(
                f"the model's own forward cannot be followed: {_said(reason, at.place)}. {_BY_HAND}"
            ) from None
        whole[path] = _said(reason, at.place)
        logger.debug("%s is called as a whole: %s", path, whole[path])


def _said(reason: str, place: Place | None) -> str:
    return reason if place is None else f"{reason} ({place})"


def _free_sizes(
    model: nn.Module, form: InputForm, sample: Nested, known: Trace, opaque: frozenset[str]
) -> set[tuple[int, int]]:
    """The (leaf, dimension) pairs, beside the batch's, whose size does not matter to the trace."""
    by_size: dict[int, set[tuple[int, int]]] = {}
    for index, shape in enumerate(form.shapes):
        for dim, size in enumerate(shape or ()):
            if (index, dim) not in form.free and size > 1:
                by_size.setdefault(size, set()).add((index, dim))
    free: set[tuple[int, int]] = set()
    for size, dims in list(by_size.items())[:_SIZES_TRIED]:
        try:
            other = _record(model, form.resized(sample, dims, size // 2), opaque, training=True)
        except Exception:  # whatever the model says to a size it cannot take
            continue
        if not differences(known, other):
            free |= dims
    return free


def _record(
    model: nn.Module, arguments: Arguments, opaque: frozenset[str], *, training: bool
) -> Trace:
    args, kwargs = cloned(arguments)
    for module in model.modules():
        module.training = training
    with torch.enable_grad():
        return record(model, args, kwargs, opaque=opaque)


# -- the sample, and what the model looks like on it ----------------------------------------------


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # A shortcut in evaluation mode that looks at the mask's values, and that layers cannot be cut out
    # of: a nested tensor for all of them. The layers are run one by one instead, as in training.
    encoders: list[Any] = [
        module for module in model.modules() if hasattr(module, "use_nested_tensor")
    ]
    nested_tensors = [encoder.use_nested_tensor for encoder in encoders]
    buffers = SavedBuffers([model])
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.is_cuda}
    try:
        for encoder in encoders:
            encoder.use_nested_tensor = False
        with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
            yield
    finally:
        buffers.restore()
        for encoder, use in zip(encoders, nested_tensors, strict=True):
            encoder.use_nested_tensor = use
        for module, mode in modes:
            module.training = mode


def _warm_up(model: nn.Module, form: InputForm, sample: Nested) -> None:
    """What a forward does only the first time (fill a cache) is done; and whether the sample fits."""
    args, kwargs = cloned(form.call.arguments(sample))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(sample))
        raise ModelCaptureError(
            f"the model could not run on the sample ({shapes}), which its forward was given "
            f"{form.call.told(sample)}: {type(error).__name__}: {error}"
        ) from error


def _verify(chain: GraphChain, sample: Nested, modes: Sequence[bool] = (True, False)) -> None:
    """The chain computes what the model does, in training mode (True) and evaluation mode.

    Raises:
        ModelCaptureError: it does not.
    """
    model = chain.model
    (whole,) = chain.stages([])
    buffers = SavedBuffers([model])
    seed = torch.random.get_rng_state()
    for training in modes:
        for module in model.modules():
            module.training = training
        results = []
        for run in (_plain_call(chain, sample), lambda: whole(cloned(sample))):
            torch.random.set_rng_state(seed)
            with torch.enable_grad():
                results.append(map_tensors(torch.detach, run()))
            buffers.restore()
        if not _same(*results):
            mode = "training" if training else "evaluation"
            raise ModelCaptureError(
                f"in {mode} mode the captured chain does not give the model's own output on the sample: "
                f"its forward keeps state in Python, draws random numbers from elsewhere than torch, "
                f"or is not deterministic. {_BY_HAND}"
            )


def _plain_call(chain: GraphChain, sample: Nested) -> Any:
    args, kwargs = cloned(chain.form.call.arguments(sample))
    return lambda: chain.model(*args, **kwargs)


def _same(one: Any, other: Any) -> bool:
    a, spec = pytree.tree_flatten(one)
    b, other_spec = pytree.tree_flatten(other)
    return spec == other_spec and all(
        _same_tensor(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one.is_cuda:  # whose sums may come in another order every time
        return one.shape == other.shape and bool(
            torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)
        )
    return one.shape == other.shape and bool(
        ((one == other) | ((one != one) & (other != other))).all()
    )


# -- models that cannot be trained here -------------------------------------------------------------


def check_capturable(model: nn.Module) -> None:
    """Whether ``model`` could be captured and trained, as far as that shows without a sample.

    Raises:
        TypeError: it is no module.
        ModelCaptureError: it could not; the message says what to give.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module; got a {type(model).__name__}")
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelCaptureError(f"the model is wrapped in {kind}; give model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelCaptureError("the model is a compiled script; give the module it was made from")
    devices: dict[torch.device, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ModelCaptureError(
                f"{name} has no shape yet (a lazy layer); run one batch through the model first"
            )
        devices.setdefault(tensor.device, name)
        if tensor.is_quantized:
            raise ModelCaptureError(
                f"{name} is quantized ({tensor.dtype}), which cannot be trained"
            )
        if tensor.is_complex() and tensor.requires_grad:
            raise ModelCaptureError(
                f"parameter {name} is {tensor.dtype}; complex weights cannot be trained here. Keep its "
                f"parts as a real parameter: nn.Parameter(torch.view_as_real(p)), and "
                f"torch.view_as_complex in the forward."
            )
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ModelCaptureError(
            f"the model lies on several devices ({found}); give it on one (model.cpu()), the runner "
            f"places its stages itself"
        )
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ModelCaptureError(
                f"{path or 'the model'} went through torch.compile; give the module before that"
            )
        if ".quantized" in type(module).__module__:
            raise ModelCaptureError(f"{path or 'the model'} is quantized, which cannot be trained")
