"""Models by the names that the command line takes."""

from __future__ import annotations

import importlib
import os
import sys

from torch import nn

from fdg_cuda import models
from fdg_cuda.names import did_you_mean


def find_model(name: str, *, in_channels: int, classes: int, image_size: int) -> nn.Module:
    """The model called ``name``: of this package; of torchvision; or ``package.module:function``,
    which is called without arguments and returns a module (a class, say). The current folder is looked
    in too.

    Args:
        in_channels: of an image.
        classes: that it tells apart.
        image_size: pixels from left to right; for models that must know.

    Raises:
        ValueError: there is none, or it cannot be made.
    """
    if ":" in name:
        return _made_by(name)
    if name in models.names():
        return models.build(
            name, in_channels=in_channels, num_classes=classes, image_size=image_size
        )
    from torchvision.models import get_model, list_models

    own = f" A model of {name}.py is {name}:function." if os.path.isfile(f"{name}.py") else ""
    known = list_models(module=importlib.import_module("torchvision.models"))
    if name not in known:
        raise ValueError(
            f"--model: there is no {name!r}.{did_you_mean(name, [*models.names(), *known])} It takes "
            f"one of {', '.join(models.names())}, a classification model of torchvision such as "
            f"resnet50, or package.module:function for one of your own.{own}"
        )
    if in_channels != 3:
        raise ValueError(
            f"--model: torchvision's {name} takes images of 3 channels, and these have {in_channels}; "
            f"take one of {', '.join(models.names())}, or package.module:function for one of your own."
        )
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    built: nn.Module = get_model(name, weights=None, num_classes=classes, **_plain(name), **sized)
    return built


def is_convolutional(model: nn.Module) -> bool:
    """Whether it is worth laying images out with their channels last."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _plain(name: str) -> dict[str, bool]:
    """Auxiliary heads off: they give several outputs while training."""
    return (
        {"aux_logits": False, "init_weights": False}
        if name in ("googlenet", "inception_v3")
        else {}
    )


def _made_by(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    if module.endswith(".py"):
        right = f"{module.removesuffix('.py').replace(os.sep, '.')}:{function}"
        raise ValueError(f"--model: {name} names a file; a module is meant, as in {right}")
    here = os.getcwd()
    if not {"", here} & set(sys.path):  # as for `python -m`
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"--model: {module} cannot be imported: {error}") from error
    make = getattr(found, function, None)
    if not callable(make):
        names = [key for key, value in vars(found).items() if callable(value)]
        raise ValueError(
            f"--model: {module} has no function or class {function!r}.{did_you_mean(function, names)}"
        )
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"--model: {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {name}() must return an nn.Module; got {type(model).__name__}")
    return model
