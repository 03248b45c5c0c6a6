"""What the plan command plans: a model by name, and a batch of the shape it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fdg_cuda.model_names import find_model, is_convolutional
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
    capture: bool

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
    model = find_model(
        options.model,
        in_channels=options.shape[0],
        classes=options.classes,
        image_size=options.shape[-1],
    )
    sample = torch.randn(options.batch_size, *options.shape)
    target = torch.randint(0, options.classes, (options.batch_size,))
    if is_convolutional(model):
        # As the training command has it.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sample = sample.contiguous(memory_format=torch.channels_last)
    with console.status("building the model") as status:
        try:
            return plan(
                model,
                sample,
                options.devices,
                target=target,
                hardware=options.hardware,
                backward_weights=options.backward_weights,
                precision=options.precision,
                capture=options.capture,
                on_progress=status.update,
            )
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            # A layer's of torch, which says nothing of options.
            raise RuntimeError(
                f"{error} (given was a batch of {options.batch_size} images of {options.image}; --image "
                f"and --classes say what the model takes)"
            ) from error
