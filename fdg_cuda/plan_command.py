"""What the plan command plans: a model by name, and a batch of the shape it takes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fdg_cuda import models
from fdg_cuda.names import did_you_mean
from fdg_cuda.planning import plan
from fdg_cuda.plans import Plan


@dataclass(frozen=True)
class PlanOptions:
    """The options of the command; see its help."""

    model: str
    devices: Sequence[int | str] | None
    hardware: Path | None
    batch_size: int
    image: str
    classes: int
    backward_weights: str | None
    precision: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        try:
            shape = tuple(int(size) for size in self.image.split(","))
        except ValueError:
            shape = ()
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"--image takes channels, height and width, such as 3,224,224; got {self.image!r}"
            )
        return shape


def make_plan(options: PlanOptions, console: Console) -> Plan:
    """Build the model, and plan with random images.

    Raises:
        ValueError, TypeError, OSError: options that cannot work.
    """
    if options.hardware is not None and not options.hardware.is_file():
        raise ValueError(f"--hardware names {options.hardware}, and there is no such file")
    model = find_model(options.model, shape=options.shape, classes=options.classes)
    sample = torch.randn(options.batch_size, *options.shape)
    target = torch.randint(0, options.classes, (options.batch_size,))
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        # As the training command has it.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sample = sample.contiguous(memory_format=torch.channels_last)
    with console.status("building the model") as status:
        return plan(
            model,
            sample,
            options.devices,
            target=target,
            hardware=options.hardware,
            backward_weights=options.backward_weights,
            precision=options.precision,
            on_progress=status.update,
        )


def find_model(name: str, *, shape: Sequence[int], classes: int) -> nn.Module:
    """The model called ``name``: of this package; of torchvision; or ``package.module:function``,
    which is called without arguments and returns a module.

    Args:
        shape: of one image, (channels, height, width).
        classes: that it tells apart.

    Raises:
        ValueError: there is none, or it cannot be made.
    """
    if ":" in name:
        return _made_by(name)
    if name in models.names():
        return models.build(name, in_channels=shape[0], num_classes=classes, image_size=shape[-1])
    from torchvision.models import get_model, list_models

    known = list_models(module=importlib.import_module("torchvision.models"))
    if name in known:
        built: nn.Module = get_model(name, weights=None, num_classes=classes, **_plain(name))
        return built
    raise ValueError(
        f"--model: there is no {name!r}.{did_you_mean(name, [*models.names(), *known])} It takes one "
        f"of {', '.join(models.names())}, a classification model of torchvision such as resnet50, or "
        f"package.module:function for one of your own."
    )


def _plain(name: str) -> dict[str, bool]:
    """Auxiliary heads off: they give several outputs while training."""
    return (
        {"aux_logits": False, "init_weights": False}
        if name in ("googlenet", "inception_v3")
        else {}
    )


def _made_by(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model: {name} cannot be imported: {error}") from error
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"--model: {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model: {name}() must return an nn.Module; got a {type(model).__name__}"
        )
    return model
