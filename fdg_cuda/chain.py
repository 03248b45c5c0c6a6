"""What a runner can train of a model, and what it refuses, with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdg_cuda.nested import Nested, stranger_in, tensors
from fdg_cuda.torch_facts import keeps_state

TRAINABLE_DTYPES = (torch.float32, torch.float64)


def check_parameters(model: nn.Module, *, on_cpu: bool = True) -> None:
    """``on_cpu``: the stages are on the CPU.

    Raises:
        TypeError: a parameter of a dtype that cannot be trained.
        ValueError: a parameter that is not on the CPU though the stages are, two that lie in the same
            memory, or no trainable parameter at all.
    """
    trainable = 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"parameter {name} has no shape yet (a lazy layer); run one batch through the model "
                f"first"
            )
        if on_cpu and parameter.device.type != "cpu":
            raise ValueError(
                f"parameter {name} is on {parameter.device}, but the stages are on the CPU; give the "
                f"model on the CPU (model.cpu()), the runner places its stages itself"
            )
        if parameter.dtype not in TRAINABLE_DTYPES and parameter.requires_grad:
            raise TypeError(
                f"parameter {name} is {parameter.dtype}; the fused update trains float32 and float64 "
                f"weights. Convert the model with model.float()."
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name} has a hook on its gradient, which would not be called: batches in "
                f"flight train copies of it. Remove the hook; hooks on modules and activations work."
            )
        trainable += parameter.requires_grad
    if not trainable:
        raise ValueError("the model has no trainable parameter (requires_grad is False for all)")
    _check_memory(model)


def _check_memory(model: nn.Module) -> None:
    """Parameters that are tied by their memory (``a.data = b.data``) would be trained apart."""
    spans = []
    for name, parameter in model.named_parameters():
        if parameter.layout == torch.strided and parameter.dtype in TRAINABLE_DTYPES:
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            last = sum((size - 1) * step for size, step in steps)
            begin = parameter.data_ptr()
            if parameter.numel() > 0:
                spans.append(
                    (begin, begin + (last + 1) * parameter.element_size(), name, parameter)
                )
    spans.sort(key=lambda span: span[:2])
    open_spans: list[tuple[int, int, str, nn.Parameter]] = []
    for span in spans:
        begin, _, name, parameter = span
        open_spans = [earlier for earlier in open_spans if earlier[1] > begin]
        for _, _, other, known in open_spans:
            if (parameter.requires_grad or known.requires_grad) and _share(parameter, known):
                raise ValueError(
                    f"parameters {other} and {name} lie in the same memory, but are two parameters: "
                    f"training would untie them. Tie them by assigning the parameter itself "
                    f"(b.weight = a.weight), or give each its own memory (b.weight.data = "
                    f"b.weight.data.clone())."
                )
        open_spans.append(span)


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose memory overlaps have an element in common."""
    if one.device.type != "cpu" or other.device.type != "cpu":
        return True  # numpy, which knows of interleaved views too, sees the CPU's memory only
    return np.shares_memory(one.detach().numpy(), other.detach().numpy())


def check_shared(model: nn.Module, stages: Sequence[Sequence[nn.Module]]) -> None:
    """Raises:
    ValueError: a parameter or buffer belongs to two stages, or a module that may keep state does.
    """
    names = {
        id(tensor): name
        for named in (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named
    }
    owner: dict[int, int] = {}
    for number, layers in enumerate(stages):
        for layer in layers:
            for tensor in (*layer.parameters(), *layer.buffers()):
                if id(tensor) not in names:  # a captured stage's own: a copy, or never written into
                    continue
                first = owner.setdefault(id(tensor), number)
                if first != number:
                    raise ValueError(
                        f"{names[id(tensor)]} is shared by stages {first} and "
                        f"{number}, which would each train a copy of its own. Choose split so that "
                        f"the layers sharing it are in one stage, or give each its own parameter."
                    )
    _check_shared_modules(model, stages)


def _check_shared_modules(model: nn.Module, stages: Sequence[Sequence[nn.Module]]) -> None:
    """What a forward leaves in a module's attributes another batch's would find, in no fixed order."""
    names = {id(module): name for name, module in model.named_modules()}
    owner: dict[int, int] = {}
    for number, layers in enumerate(stages):
        for module in (module for layer in layers for module in layer.modules()):
            first = owner.setdefault(id(module), number)
            if first != number and keeps_state(module):
                name = f"module {names[id(module)]} (a {type(module).__name__})"
                raise ValueError(
                    f"{name} is shared by stages {first} and {number}, which work on different "
                    f"batches at the same time: what its forward keeps in it would be mixed up. Choose "
                    f"split so that its users are in one stage, or give each its own "
                    f"(copy.deepcopy(module))."
                )


def check_output(value: Any, what: str) -> Nested:
    """``value`` if it is what ``what`` (a stage or layer) may pass on.

    Raises:
        TypeError: there is no tensor in it, or something that is neither tensor nor plain.
    """
    stranger = stranger_in(value)
    if stranger is None and tensors(value):
        return value
    trouble = ""
    if stranger is None:
        trouble = " without any tensor"
    elif stranger is not value:
        trouble = f" with a {type(stranger).__name__} in it"
    raise TypeError(
        f"{what} returned a {type(value).__name__}{trouble}; each part of a chain passes on one tensor, "
        f"or tuples, lists and dicts of tensors. Cut the chain elsewhere, wrap the layer so that it "
        f"returns one of those, or tell torch how to take its type apart: "
        f"torch.utils._pytree.register_pytree_node."
    )


def check_scalar(loss: Any) -> Tensor:
    """``loss`` if it is what a loss function returns.

    Raises:
        TypeError: it is no scalar tensor.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn must return a scalar tensor, the mean over the batch; got {got}")
    return loss


def check_loss(loss: Any, batch: int) -> Tensor:
    """``loss`` if training can start from it.

    Raises:
        TypeError: it is no scalar tensor.
        ValueError: nothing trainable had a part in it.
    """
    scalar = check_scalar(loss)
    if not scalar.requires_grad:
        raise ValueError(
            f"the loss of batch {batch} depends on no trainable parameter (was the output detached, "
            f"or the loss computed under no_grad?)"
        )
    return scalar
