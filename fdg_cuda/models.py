"""The networks of the papers, each written as a chain that can be cut between any two children.

A chain is an ``nn.Sequential`` mapping ``(N, C, H, W)`` images to ``(N, num_classes)`` logits. Its
children are the places where the network may be cut into stages: the stem is one child, every
residual block is one child, and pooling, flattening and the classifier together are the last one.

Two promises make the cuts safe. No child writes into its input, which belongs to the child before
it (and may be kept there for a delayed backward pass). No child returns a view of its input.

Sources:

* ResNet: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
* Wide ResNet: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016.
* Initialisation: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", ICCV 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from fdg_cuda.names import did_you_mean

__all__ = [
    "BasicBlock",
    "PreActBlock",
    "ZeroPadShortcut",
    "build",
    "cifar_resnet",
    "mlp",
    "names",
    "resnet18",
    "wide_resnet",
]


class ZeroPadShortcut(nn.Module):
    """The parameter-free shortcut: subsample in space, append zero channels.

    Option A of He et al. 2016, sections 3.3 and 4.2. Maps ``(N, C, H, W)`` to
    ``(N, C + extra_channels, ceil(H / stride), ceil(W / stride))``; keeps the dtype and, where
    ``stride`` divides H and W, the memory format.
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, figure 2).

    Maps ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
    Where the shapes differ the shortcut is a 1x1 convolution if ``projection`` (option B), else
    subsampling and zero channels (option A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.shortcut = ZeroPadShortcut(out_channels - in_channels, stride)
            if projection:
                self.shortcut = nn.Sequential(
                    _conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
                )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        # The sum is a tensor of its own, so the in-place ReLU cannot reach x through the identity.
        out: Tensor = self.relu(residual + self.shortcut(x))
        return out


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution (Zagoruyko & Komodakis 2016, figure 1a).

    Maps ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
    Where the shapes differ the shortcut is a 1x1 convolution of the activated input, as in the
    authors' code; otherwise it is the untouched input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, 1)
        # In place is safe: it always follows a batch norm, which neither aliases its input nor
        # needs its output in the backward pass.
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = _conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        residual: Tensor = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def cifar_resnet(depth: int, *, in_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """ResNet for small images with parameter-free shortcuts (He et al. 2016, section 4.2).

    ``depth`` is 6n + 2: a stem, three groups of n blocks with 16, 32 and 64 channels, a head;
    3n + 2 children. Input ``(N, in_channels, H, W)``.

    Raises ValueError if ``depth`` is not 6n + 2 with n >= 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"cifar_resnet: depth must be 6n + 2 (8, 14, 20, ...), got {depth}.")
    per_group = (depth - 2) // 6
    blocks = _groups(
        partial(BasicBlock, projection=False),
        in_channels=16,
        widths=(16, 32, 64),
        per_group=per_group,
    )
    return _initialised(
        nn.Sequential(_stem(in_channels, 16), *blocks, _head(nn.Identity(), 64, num_classes))
    )


def resnet18(*, in_channels: int = 3, num_classes: int = 10) -> nn.Sequential:
    """ResNet-18 (He et al. 2016, table 1) with the stem that small images need.

    The 7x7 stride-2 stem and its max-pooling are replaced by one 3x3 convolution; 64-128-256-512
    channels, 1x1 convolutions as shortcuts; 10 children. Input ``(N, in_channels, H, W)``.
    """
    blocks = _groups(
        partial(BasicBlock, projection=True),
        in_channels=64,
        widths=(64, 128, 256, 512),
        per_group=2,
    )
    return _initialised(
        nn.Sequential(_stem(in_channels, 64), *blocks, _head(nn.Identity(), 512, num_classes))
    )


def wide_resnet(
    depth: int, width: int, *, in_channels: int = 3, num_classes: int = 10
) -> nn.Sequential:
    """WRN-``depth``-``width`` without dropout (Zagoruyko & Komodakis 2016, table 1).

    ``depth`` is 6n + 4: a stem with 16 channels, three groups of n blocks with 16, 32 and 64 times
    ``width`` channels, a head that begins with the last batch norm and ReLU; 3n + 2 children.
    Input ``(N, in_channels, H, W)``.

    Raises ValueError if ``depth`` is not 6n + 4 with n >= 1 or ``width`` is below 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}.")
    if width < 1:
        raise ValueError(f"wide_resnet: width must be at least 1, got {width}.")
    widths = (16 * width, 32 * width, 64 * width)
    blocks = _groups(PreActBlock, in_channels=16, widths=widths, per_group=(depth - 4) // 6)
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
    return _initialised(
        nn.Sequential(_conv(in_channels, 16, 3, 1), *blocks, _head(last, widths[-1], num_classes))
    )


def mlp(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    hidden: tuple[int, ...] = (256, 256, 256),
) -> nn.Sequential:
    """A multi-layer perceptron for quick trials (of no paper).

    Each Linear + ReLU is one child, the first of which also flattens; the last child is the bare
    classifier. Input ``(N, in_channels, image_size, image_size)``.
    """
    children: list[nn.Module] = []
    features = in_channels * image_size * image_size
    for size in hidden:
        # A Flatten child of its own would return a view of its input.
        first: list[nn.Module] = [] if children else [nn.Flatten()]
        children.append(nn.Sequential(*first, nn.Linear(features, size), nn.ReLU(inplace=True)))
        features = size
    classifier = nn.Linear(features, num_classes)
    children.append(classifier if children else nn.Sequential(nn.Flatten(), classifier))
    return _initialised(nn.Sequential(*children))


def names() -> tuple[str, ...]:
    """The names that ``build`` knows."""
    return tuple(_REGISTRY)


def build(
    name: str, *, in_channels: int = 3, num_classes: int = 10, image_size: int = 32
) -> nn.Sequential:
    """Build the named network as a chain, float32 (torch's default dtype), freshly initialised.

    The initial weights are drawn from torch's global random generator: call
    ``torch.manual_seed`` first for a reproducible network. The chain maps
    ``(N, in_channels, image_size, image_size)`` to ``(N, num_classes)``; only ``mlp`` is bound to
    that ``image_size``, the convolutional ones pool over whatever size is left.

    Raises ValueError for an unknown name or a size below 1.
    """
    if name not in _REGISTRY:
        hint = did_you_mean(name, _REGISTRY)
        raise ValueError(f"Unknown model {name!r}.{hint} Known models: {', '.join(_REGISTRY)}.")
    sizes = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    for what, value in sizes.items():
        if value < 1:
            raise ValueError(f"build({name!r}): {what} must be at least 1, got {value}.")
    if name == "mlp":
        return mlp(in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    return _REGISTRY[name](in_channels=in_channels, num_classes=num_classes)


_REGISTRY: dict[str, Callable[..., nn.Sequential]] = {
    **{f"resnet{d}": partial(cifar_resnet, d) for d in (20, 32, 44, 56, 110, 1202)},
    "resnet18": resnet18,
    "wrn28-10": partial(wide_resnet, 28, 10),
    "wrn16-4": partial(wide_resnet, 16, 4),
    "mlp": mlp,
}


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _stem(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_channels, out_channels, 3, 1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _head(before: nn.Module, features: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes)
    )


def _groups(
    block: Callable[..., nn.Module], *, in_channels: int, widths: tuple[int, ...], per_group: int
) -> Iterator[nn.Module]:
    """Yield the residual blocks; each group but the first begins with a stride of 2."""
    for group, out_channels in enumerate(widths):
        for index in range(per_group):
            stride = 2 if group and not index else 1
            yield block(in_channels, out_channels, stride=stride)
            in_channels = out_channels


def _initialised(net: nn.Sequential) -> nn.Sequential:
    """Draw every weight as He et al. 2015 do; fan-out for convolutions as in the papers' code."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return net
