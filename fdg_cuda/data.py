"""The data sets of the experiments as tensors in memory.

They are held whole as uint8 pixels: a batch is one index operation, normalised and augmented as a
whole. All randomness comes from a generator that the caller gives, never from torch's global one.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fdg_cuda.batch_loader import BatchLoader
from fdg_cuda.names import did_you_mean

__all__ = ["BatchLoader", "DataSpec", "ImageTensors", "load", "names", "read_idx"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# Mean and deviation per channel, from the code of Zagoruyko & Komodakis 2016 (training images).
_CIFAR10 = ((125.3 / 255, 63.0 / 255), (123.0 / 255, 62.1 / 255), (113.9 / 255, 66.7 / 255))
_CIFAR100 = ((129.3 / 255, 68.2 / 255), (124.1 / 255, 65.4 / 255), (112.4 / 255, 70.4 / 255))
# Channels, classes, image size, largest pixel value; mean and deviation of pixel / largest value.
_FACTS = {  # digits, fashion-mnist: computed over their 1,438 and 60,000 training images.
    "digits": (1, 10, 8, 16, ((0.3058, 0.3766),)),
    "fashion-mnist": (1, 10, 28, 255, ((0.2860, 0.3530),)),
    "cifar10": (3, 10, 32, 255, _CIFAR10),
    "cifar100": (3, 100, 32, 255, _CIFAR100),
}


@dataclass(eq=False)
class ImageTensors(Dataset[tuple[Tensor, int]]):
    """Images uint8 ``(N, C, H, W)`` with labels int64 ``(N,)``, held as two tensors.

    ``pixels`` are mean and standard deviation of each channel after division by ``scale``.
    Indexing gives a normalised float32 ``(C, H, W)`` image and its int label; ``batch`` gives many
    at once, augmented if ``augment``. Raises ValueError for other shapes or dtypes, or no image.
    """

    images: Tensor
    labels: Tensor
    _: KW_ONLY
    pixels: Sequence[tuple[float, float]]
    scale: float = 255.0
    augment: bool = False

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if x.dtype != torch.uint8 or x.dim() != 4 or not x.numel():
            raise ValueError(f"images must be uint8 (N, C, H, W), got {x.dtype} {tuple(x.shape)}.")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}.")
        mean, std = torch.tensor(self.pixels, dtype=torch.float64).view(-1, 2, 1, 1).unbind(1)
        self._factor = (1 / (self.scale * std)).float()
        self._offset = (-mean / std).float()

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"{type(self).__name__}({len(self)} images of {shape}, augment={self.augment})"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._normalised(self.images[index]), int(self.labels[index])

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images float32 ``(B, C, H, W)``, labels int64 ``(B,)`` at ``index`` int64 ``(B,)``."""
        x = self._normalised(self.images[index])
        return _crop_and_flip(x, generator) if self.augment else x, self.labels[index]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels.float().mul_(self._factor).add_(self._offset)


@dataclass(frozen=True)
class DataSpec:
    """A data set ready for training: both parts, and what a network must know of them."""

    name: str
    train: ImageTensors
    test: ImageTensors
    in_channels: int
    num_classes: int
    image_size: int


def names() -> tuple[str, ...]:
    """The names that ``load`` knows."""
    return tuple(_FACTS)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    augment: bool | None = None,
) -> DataSpec:
    """Load a data set whole into memory, pixels normalised per channel.

    Args:
        name: one of ``names()``. ``digits``, the 1,797 handwritten digits inside scikit-learn,
            ignores ``root`` and ``download``; its split, 1,438 / 359 by class, is always the same.
        root: the folder of the data, ``./data`` if None, laid out as torchvision does. For
            ``fashion-mnist`` also a folder with the four IDX files, gzipped or not; if None, that
            of Debian's package ``dataset-fashion-mnist`` is looked at after ``./data``.
        download: let torchvision download into ``root`` what was not found.
        augment: pad the training images by an eighth of their size (4 at 32x32), crop at random
            and flip left-right at random (He et al. 2016, section 4.2). None: only for CIFAR.

    Raises ValueError (unknown name, damaged file), FileNotFoundError (no data), ImportError
    (scikit-learn or torchvision needed and missing) or RuntimeError (download failed).
    """
    if name not in _FACTS:
        hint = did_you_mean(name, _FACTS)
        raise ValueError(f"Unknown data set {name!r}.{hint} Known ones: {', '.join(_FACTS)}.")
    if name == "digits":
        parts = _digits()
    elif name == "fashion-mnist":
        parts = _fashion_mnist(root, download)
    else:
        parts = _cifar(name, Path(root or "data"), download)
    channels, classes, size, scale, pixels = _FACTS[name]
    for images, labels in parts:
        if images.shape[1:] != (channels, size, size) or not 0 <= labels.max() < classes:
            raise ValueError(
                f"{name} should have images {(channels, size, size)} and labels below {classes}; "
                f"got images {tuple(images.shape[1:])} and labels up to {labels.max()}."
            )
    augment = name.startswith("cifar") if augment is None else augment
    train = ImageTensors(*parts[0], pixels=pixels, scale=scale, augment=augment)
    test = ImageTensors(*parts[1], pixels=pixels, scale=scale)
    return DataSpec(name, train, test, channels, classes, size)


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a file in the IDX format of MNIST, gzipped if its name ends in .gz: uint8, ``ndim``-d.

    Raises ValueError if the file is truncated, empty or something else.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}). Fetch it again.") from error
    start = 4 + 4 * ndim
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if raw[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"{path} is no IDX file of {ndim}-dimensional bytes: it should begin with 00 00 08 "
            f"{ndim:02x}, it begins with {raw[:4].hex(' ')}."
        )
    if len(raw) <= start or len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path} is empty or damaged: {len(raw) - start} bytes follow its header, which "
            f"announces {' x '.join(map(str, shape))}. Fetch it again."
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def _digits() -> list[tuple[Tensor, Tensor]]:
    bunch = _optional("sklearn.datasets", "scikit-learn", "digits").load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    # NumPy keeps the stream of this legacy generator unchanged for ever (NEP 19).
    rng = np.random.RandomState(0)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(bunch.target == digit))
        test[torch.from_numpy(members[: round(len(members) / 5)])] = True
    return [(images[~test], labels[~test]), (images[test], labels[test])]


def _fashion_mnist(root: str | Path | None, download: bool) -> list[tuple[Tensor, Tensor]]:
    home = Path(root or "data")
    folders = [home, home / "FashionMNIST" / "raw", *([] if root else [DEBIAN_FASHION_MNIST])]
    files = _idx_files(folders)
    if not files and download:
        _torchvision("FashionMNIST", home, True, True)
        files = _idx_files(folders)
    if not files:
        raise FileNotFoundError(
            "fashion-mnist not found: none of these folders has all four *-ubyte.gz or *-ubyte "
            f"files: {', '.join(map(str, folders))}. Run `apt install dataset-fashion-mnist`, or "
            "download it with --download (in Python: download=True), or name its folder."
        )
    return [(read_idx(x, 3).unsqueeze(1), read_idx(y, 1).long()) for x, y in files]


def _idx_files(folders: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(images, labels) for training and test, in the first folder that has all four files."""
    for folder in folders:
        for end in ("ubyte.gz", "ubyte"):
            pairs = [
                (folder / f"{part}-images-idx3-{end}", folder / f"{part}-labels-idx1-{end}")
                for part in ("train", "t10k")
            ]
            if all(file.is_file() for pair in pairs for file in pair):
                return pairs
    return []


def _cifar(name: str, root: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
    sources = [_torchvision(name.upper(), root, train, download) for train in (True, False)]
    pixels = [torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous() for source in sources]
    return [(x, torch.tensor(source.targets)) for x, source in zip(pixels, sources, strict=True)]


def _torchvision(kind: str, root: Path, train: bool, download: bool) -> Any:
    datasets = _optional("torchvision.datasets", "torchvision", kind)
    try:
        return getattr(datasets, kind)(root, train=train, download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise RuntimeError(f"Download of {kind} to {root} failed: {error}") from error
        raise FileNotFoundError(
            f"No whole {kind} in {root} as torchvision stores it. Download it with --download (in "
            "Python: download=True), or name the folder that holds it."
        ) from error


def _crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image of ``(B, C, H, W)`` by up to an eighth of its height, mirror it or not."""
    count, _, height, width = x.shape
    pad = height // 8
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (count, 1, 1, 1), generator=generator, dtype=torch.bool)
    # Zero is the mean colour here, since x is normalised already.
    windows = torch.nn.functional.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    x = windows[torch.arange(count), :, top, left]
    return torch.where(mirrored, x.flip(3), x)


def _optional(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}: pip install {package} ({error})") from error
