"""The data sets and the loader: what is read, in which order, and what is said when it fails."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fdg_cuda import data
from fdg_cuda.data import BatchLoader, DataSpec, ImageTensors

FASHION_FILES = [
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
]


def numbered(count: int = 10, *, size: int = 8, augment: bool = False) -> ImageTensors:
    """Images whose pixels are all different within an image; label i belongs to image i."""
    pixels = torch.arange(3 * size * size, dtype=torch.uint8).reshape(1, 3, size, size)
    images = pixels.repeat(count, 1, 1, 1)
    images[:, 0, 0, 0] = torch.arange(count)
    unit = [(0.0, 1.0)] * 3
    return ImageTensors(images, torch.arange(count), pixels=unit, scale=1.0, augment=augment)


def epoch(loader: BatchLoader) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def write_fashion(folder: Path, *, gzipped: bool = True, size: int = 28, label: int = 9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in FASHION_FILES:
        count = 6 if name.startswith("train") else 4
        array = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
        raw = idx(array) if "images" in name else idx(np.full(count, label, np.uint8))
        path = folder / (name + (".gz" if gzipped else ""))
        path.write_bytes(gzip.compress(raw) if gzipped else raw)


# --- digits -----------------------------------------------------------------------------------


def test_digits() -> None:
    spec = data.load("digits")
    assert (spec.name, spec.in_channels, spec.num_classes, spec.image_size) == ("digits", 1, 10, 8)
    assert (len(spec.train), len(spec.test)) == (1438, 359)
    image, label = spec.train[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert not spec.train.augment


def test_digits_split_is_a_stratified_partition() -> None:
    from sklearn.datasets import load_digits

    spec, bunch = data.load("digits"), load_digits()
    train, test = spec.train, spec.test

    def rows(images: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
        return [(*x.flatten().tolist(), y) for x, y in zip(images, labels.tolist(), strict=True)]

    everything = rows(torch.tensor(bunch.images, dtype=torch.uint8), torch.tensor(bunch.target))
    parts = rows(train.images, train.labels) + rows(test.images, test.labels)
    assert sorted(parts) == sorted(everything)
    assert len(set(everything)) == len(everything)
    shares = torch.bincount(test.labels) / torch.tensor(np.bincount(bunch.target))
    assert ((shares - 0.2).abs() < 0.004).all()


def test_digits_split_is_always_the_same() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = data.load("digits").test.labels
    torch.manual_seed(2)
    assert torch.equal(first, data.load("digits").test.labels)
    # Of the split that numbers are published with: it must survive every refactoring.
    digest = hashlib.sha256(data.load("digits").test.images.numpy().tobytes()).hexdigest()
    assert digest.startswith("44761d89f8e49dae")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_pixels_are_normalised(name: str) -> None:
    if name == "fashion-mnist" and not data.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    root = data.DEBIAN_FASHION_MNIST if name == "fashion-mnist" else None
    x, _ = next(iter(BatchLoader(data.load(name, root).train, 60_000)))
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)


# --- the loader -------------------------------------------------------------------------------


def test_loader_in_order() -> None:
    loader = BatchLoader(numbered(10), 4)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))
    x, y = batches[0]
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    for at in range(4):
        assert torch.equal(x[at], numbered(10)[at][0])


def test_loader_drop_last() -> None:
    loader = BatchLoader(numbered(10), 4, drop_last=True)
    assert len(loader) == 2
    assert [len(y) for _, y in loader] == [4, 4]
    assert len(BatchLoader(numbered(8), 4)) == len(BatchLoader(numbered(8), 4, drop_last=True)) == 2


@pytest.mark.parametrize("augment", [False, True])
def test_epochs_depend_on_seed_and_number_alone(augment: bool) -> None:
    dataset = numbered(20, augment=augment)
    first = BatchLoader(dataset, 8, shuffle=True, seed=5)
    epochs = [epoch(first) for _ in range(3)]
    second = BatchLoader(dataset, 8, shuffle=True, seed=5)
    for x, y in epochs:
        torch.manual_seed(99)
        again = []
        for batch in second:
            torch.rand(3)
            again.append(batch)
        assert torch.equal(torch.cat([b[0] for b in again]), x)
        assert torch.equal(torch.cat([b[1] for b in again]), y)
    orders = [y.tolist() for _, y in epochs]
    assert all(sorted(order) == list(range(20)) for order in orders)
    orders += [epoch(BatchLoader(dataset, 8, shuffle=True, seed=6))[1].tolist()]
    assert len({tuple(order) for order in orders}) == 4


def test_epoch_counts_from_iter_and_can_be_set() -> None:
    loader = BatchLoader(numbered(20), 8, shuffle=True)
    expected = [epoch(loader)[1].tolist() for _ in range(3)]
    loader = BatchLoader(numbered(20), 8, shuffle=True)
    iter(loader)
    next(iter(loader))
    assert loader.epoch == 2
    assert epoch(loader)[1].tolist() == expected[2]
    loader.epoch = 1
    assert epoch(loader)[1].tolist() == expected[1]


def test_two_passes_at_once() -> None:
    loader = BatchLoader(numbered(20, augment=True), 8, shuffle=True)
    first, second = [], []
    for a, b in zip(loader, loader, strict=True):
        first.append(a[0])
        second.append(b[0])
    loader.epoch = 0
    assert torch.equal(torch.cat(first), epoch(loader)[0])
    assert torch.equal(torch.cat(second), epoch(loader)[0])


def test_neighbouring_seeds_share_no_epoch() -> None:
    orders = set()
    for seed in range(4):
        loader = BatchLoader(numbered(20), 20, shuffle=True, seed=seed)
        orders |= {tuple(epoch(loader)[1].tolist()) for _ in range(4)}
    assert len(orders) == 16


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    epoch(BatchLoader(numbered(20, augment=True), 8, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("augment", [False, True])
def test_channels_last(augment: bool) -> None:
    dataset = numbered(10, augment=augment)
    plain, last = BatchLoader(dataset, 4), BatchLoader(dataset, 4, channels_last=True)
    for (x, _), (z, _) in zip(plain, last, strict=True):
        assert x.is_contiguous()
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, z)


def test_loader_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        BatchLoader(numbered(), 0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        BatchLoader(numbered(), 1, seed=-1)
    with pytest.raises(ValueError, match="batch_size is 11, the data set has 10 samples"):
        BatchLoader(numbered(), 11, drop_last=True)


# --- ImageTensors and its augmentation --------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "images must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), r"got torch.uint8 \(2, 4"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long(), r"got .* \(0, 3, 4, 4"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "got torch.float32"),
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(3).long(),
            r"must be int64 \(2,\)",
        ),
    ],
)
def test_image_tensors_arguments(images: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageTensors(images, labels, pixels=[(0.0, 1.0)] * 3)


def test_normalisation() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1)
    dataset = ImageTensors(images, torch.zeros(1).long(), pixels=[(0.5, 0.25), (0.2, 0.4)])
    torch.testing.assert_close(dataset[0][0].flatten(), torch.tensor([-2.0, 2.0]))
    with pytest.raises(IndexError):
        dataset[1]


def test_augmentation_is_a_shift_and_a_mirror() -> None:
    """Each 32x32 image is one of the 9 x 9 windows of its zero-padded self, or its mirror image."""
    count = 400
    images = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8).expand(count, -1, -1, -1)
    dataset = ImageTensors(
        images, torch.zeros(count).long(), pixels=[(0.0, 1.0)] * 3, scale=1.0, augment=True
    )
    x, _ = next(iter(BatchLoader(dataset, count)))
    padded = torch.zeros(3, 40, 40)
    padded[:, 4:36, 4:36] = images[0]
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            windows[window.numpy().tobytes()] = (top, left, False)
            windows[window.flip(2).numpy().tobytes()] = (top, left, True)
    seen = [windows[image.numpy().tobytes()] for image in x]
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert 150 < sum(mirrored for *_, mirrored in seen) < 250
    # Rows and columns are drawn apart from each other, and from the mirroring.
    assert len(set(seen)) > 100


# --- Fashion-MNIST ----------------------------------------------------------------------------


def check_fashion(spec: DataSpec) -> None:
    assert (len(spec.train), len(spec.test)) == (6, 4)
    assert spec.train[0][0].shape == (1, 28, 28)
    assert spec.train[5][1] == 9
    expected = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    assert np.array_equal(spec.train.images[:, 0].numpy(), expected)


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("inner", [".", "FashionMNIST/raw"])
def test_fashion_from_a_read_only_folder(tmp_path: Path, inner: str, gzipped: bool) -> None:
    write_fashion(tmp_path / inner, gzipped=gzipped)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / inner).chmod(0o555)
    check_fashion(data.load("fashion-mnist", tmp_path))
    check_fashion(data.load("fashion-mnist", str(tmp_path), download=True))
    (tmp_path / inner).chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


def test_fashion_looks_in_data_then_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(FileNotFoundError) as error:
        data.load("fashion-mnist")
    for said in ("data, ", "data/FashionMNIST/raw", str(tmp_path / "debian"), "--download"):
        assert said in str(error.value)
    assert "apt install dataset-fashion-mnist" in str(error.value)
    write_fashion(tmp_path / "debian", label=3)
    assert data.load("fashion-mnist").train[0][1] == 3
    write_fashion(tmp_path / "data/FashionMNIST/raw", label=4)
    assert data.load("fashion-mnist").train[0][1] == 4
    with pytest.raises(FileNotFoundError) as error:
        data.load("fashion-mnist", tmp_path / "elsewhere")
    assert "debian" not in str(error.value).partition("Run")[0]


def test_fashion_as_debian_installs_it() -> None:
    if not data.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    spec = data.load("fashion-mnist", data.DEBIAN_FASHION_MNIST)
    assert spec.train.labels.bincount().tolist() == [6000] * 10
    assert spec.test.labels.bincount().tolist() == [1000] * 10
    assert spec.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(idx(np.ones((3, 4, 4), np.uint8)))[:-12], "is not a whole gzip file"),
        (b"<html>404</html>", "is not a whole gzip file"),
        (gzip.compress(b"<html>404</html>"), "is no IDX file .* begin with 00 00 08 03, it begins"),
        (gzip.compress(b""), "is no IDX file"),
        (gzip.compress(idx(np.ones(3, np.uint8))), "is no IDX file .* 00 00 08 01"),
        (gzip.compress(idx(np.ones((3, 4, 4), np.uint8))[:-1]), "damaged: 47 bytes .* 3 x 4 x 4"),
        (gzip.compress(idx(np.ones((3, 4, 4), np.uint8)) + b"!"), "damaged: 49 bytes"),
        (gzip.compress(idx(np.ones((3, 4, 4), np.uint8))[:9]), "damaged"),
        (gzip.compress(idx(np.ones((0, 4, 4), np.uint8))), "empty or damaged"),
    ],
)
def test_idx_damaged_or_foreign(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} .*{said}"):
        data.read_idx(path, 3)


def test_fashion_with_the_contents_of_another_set(tmp_path: Path) -> None:
    write_fashion(tmp_path, size=16)
    with pytest.raises(ValueError, match=r"images \(1, 28, 28\) .* got images \(1, 16, 16\)"):
        data.load("fashion-mnist", tmp_path)
    write_fashion(tmp_path, label=46)
    with pytest.raises(ValueError, match=r"labels below 10; .* labels up to 46"):
        data.load("fashion-mnist", tmp_path)


# --- CIFAR ------------------------------------------------------------------------------------


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images to a file, as torchvision stores them; it is told the checksums of these."""
    import torchvision

    kind = getattr(torchvision.datasets, name.upper())
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def put(file: str, content: dict[str, Any]) -> str:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    top = 9 if name == "cifar10" else 99
    for which in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(kind, which):
            pixels = rng.integers(0, 256, (5, 3072), dtype=np.uint8)
            entries.append([file, put(file, {"data": pixels, key: [0, 1, 2, 3, top]})])
        monkeypatch.setattr(kind, which, entries)
    meta = {**kind.meta, "md5": put(kind.meta["filename"], {kind.meta["key"]: ["a", "b"]})}
    monkeypatch.setattr(kind, "meta", meta)


@pytest.mark.parametrize(("name", "classes", "count"), [("cifar10", 10, 25), ("cifar100", 100, 5)])
def test_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int, count: int
) -> None:
    write_cifar(tmp_path, name, monkeypatch)
    spec = data.load(name, tmp_path)
    assert (spec.in_channels, spec.num_classes, spec.image_size) == (3, classes, 32)
    assert (len(spec.train), len(spec.test)) == (count, 5)
    first = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    assert np.array_equal(spec.train.images[:5].numpy(), first)
    assert spec.test.labels.tolist() == [0, 1, 2, 3, classes - 1]
    image, label = spec.train[4]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, classes - 1)
    assert spec.train.augment
    assert not spec.test.augment
    assert not data.load(name, tmp_path, augment=False).train.augment


def test_cifar_batches_are_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    train = data.load("cifar10", tmp_path).train
    loaders = [BatchLoader(train, 8, shuffle=True, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (epoch(loader)[0] for loader in loaders)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, epoch(loaders[0])[0])


def test_cifar_statistics_are_those_published() -> None:
    for name, mean, std in [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ]:
        pixels = torch.tensor(data._FACTS[name][-1])
        torch.testing.assert_close(pixels, torch.tensor([mean, std]).T, rtol=0, atol=4e-4)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name.upper()} in {tmp_path} .* --download"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import torchvision

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(kind, "download", offline)
    with pytest.raises(RuntimeError, match=f"to {tmp_path} failed: no route to host"):
        data.load(name, tmp_path, download=True)


def test_fashion_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fake(root: Path, train: bool, download: bool) -> None:
        assert download
        write_fashion(root / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fake)
    check_fashion(data.load("fashion-mnist", tmp_path, download=True))


# --- names and missing libraries --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("FashionMNIST", "fashion-mnist"), ("cifar", "cifar10")]
)
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'. Did you mean '{near}'") as error:
        data.load(name)
    assert data.names() == ("digits", "fashion-mnist", "cifar10", "cifar100")
    assert all(known in str(error.value) for known in data.names())


def test_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn.datasets", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.load("digits")
    with pytest.raises(ImportError, match="pip install torchvision"):
        data.load("cifar10", tmp_path)
    # Reading the files that are there needs neither.
    write_fashion(tmp_path)
    check_fashion(data.load("fashion-mnist", tmp_path))
