"""What recording has to know of torch: which modules are layers, which questions to a tensor are about
more than this batch."""

from __future__ import annotations

import torch
from torch import nn

from fdg_cuda.nested import PLAIN

# Modules of torch that are chains of others rather than one layer.
_CONTAINERS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
_LAYERS_FROM = ("torch.nn.", "torch.ao.", "torch.jit.")

# What may be among a call's arguments beside tensors and containers.
HANDED_ON = (
    *PLAIN,
    torch.layout,
    torch.memory_format,
    torch.Generator,
    type,
    type(Ellipsis),
    range,
)

# What a tensor may be asked, the answer being as good for every later batch. (Sizes are seen to
# before; attributes that are no tensors are all of this kind.)
FACTS = frozenset(
    [
        "dim",
        "ndimension",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_signed",
        "is_inference",
        "is_conj",
        "is_neg",
        "is_pinned",
        "is_shared",
        "is_set_to",
        "is_same_size",
        "is_distributed",
        "is_coalesced",
        "get_device",
        "element_size",
        "storage_offset",
        "stride",
        "size",
        "__len__",
        "numel",
        "nelement",
        "result_type",
        "promote_types",
        "can_cast",
        "is_tensor",
        "is_storage",
        "is_autocast_enabled",
        "type",
        "__repr__",
        "__format__",
        "__dir__",
        "__hash__",
        "__reduce_ex__",
        "__deepcopy__",
        "_assert",
        "_assert_async",
        "get_default_dtype",
        "_is_view",
        "is_vulkan_available",
        "has_names",
        "is_grad_enabled",
        "dim_order",
    ]
)
# Change a tensor's shape under those who look at it.
RESHAPING = frozenset(
    [
        "unsqueeze_",
        "squeeze_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "resize_",
        "resize_as_",
        "set_",
        "as_strided_",
    ]
)


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own layers, which are called as a whole."""
    return type(module).__module__.startswith(_LAYERS_FROM) and not (
        isinstance(module, (*_CONTAINERS, nn.Sequential, nn.ModuleList, nn.ModuleDict))
    )


def keeps_state(module: nn.Module) -> bool:
    """Whether a forward of ``module`` may leave something in it that the next one sees, beside what its
    parameters, buffers and submodules keep: any may, but torch's own, of which none does."""
    return not type(module).__module__.startswith("torch.nn.")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be told when ``module`` as a whole runs."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
