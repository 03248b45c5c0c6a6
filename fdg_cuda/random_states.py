"""The random states of a process: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdg_cuda.accelerator import accelerator


@dataclass(frozen=True)
class RandomStates:
    """What the generators everyone shares were at one moment.

    Attributes:
        python: ``random.getstate()``.
        numpy: ``numpy.random.get_state()``, the legacy generator's.
        torch: uint8, that of torch's CPU generator.
        devices: by CUDA ordinal, uint8.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: Tensor
    devices: dict[int, Tensor]

    @classmethod
    def now(cls, ordinals: set[int]) -> RandomStates:
        """The states of this moment, with those of CUDA devices ``ordinals``."""
        numpy_state: Any = np.random.get_state()
        return cls(
            random.getstate(),
            numpy_state,
            torch.get_rng_state(),
            {ordinal: accelerator().random_state(ordinal) for ordinal in sorted(ordinals)},
        )

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for ordinal, state in self.devices.items():
            accelerator().set_random_state(ordinal, state)

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, exact to the bit."""
        version, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        return {
            "python": torch.tensor([version, *words], dtype=torch.int64),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
            "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
            "torch": self.torch,
            **{f"cuda{ordinal}": state for ordinal, state in self.devices.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RandomStates:
        """What :meth:`to_tensors` gave."""
        version, *words = tensors["python"].tolist()
        gauss = tensors["python_gauss"].tolist()
        *keys, position, has_gauss = tensors["numpy"].tolist()
        return cls(
            (version, tuple(words), gauss[0] if gauss else None),
            (
                "MT19937",
                np.array(keys, dtype=np.uint32),
                position,
                has_gauss,
                tensors["numpy_gauss"].item(),
            ),
            tensors["torch"],
            {
                int(name.removeprefix("cuda")): state
                for name, state in tensors.items()
                if name.startswith("cuda")
            },
        )
