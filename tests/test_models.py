"""The networks: sizes against the papers, and the promises that let them be cut anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fdg_cuda import models

# As printed in He et al. 2016, table 6, and Zagoruyko & Komodakis 2016, tables 4 and 5; that of
# resnet18 is the sum over its layers. (WRN-40-4, printed 8.9, has 8.949 million.)
MILLIONS = {
    "resnet20": "0.27",
    "resnet32": "0.46",
    "resnet44": "0.66",
    "resnet56": "0.85",
    "resnet110": "1.7",
    "resnet1202": "19.4",
    "resnet18": "11.2",
    "wrn28-10": "36.5",
}
WIDE = {(40, 1): "0.6", (40, 2): "2.2", (40, 4): "8.9", (16, 8): "11.0", (22, 8): "17.2"}

# Chains of every kind of child, small enough for a test; the registry's large ones share them.
SMALL: dict[str, Callable[[], nn.Sequential]] = {
    "resnet": lambda: models.cifar_resnet(14, in_channels=1),
    "resnet18": lambda: models.resnet18(in_channels=1),
    "wide": lambda: models.wide_resnet(10, 2, in_channels=1),
    "wide, one identity": lambda: models.wide_resnet(16, 1, in_channels=1),
    "mlp": lambda: models.mlp(in_channels=1, image_size=16),
    "linear": lambda: models.mlp(in_channels=1, image_size=16, hidden=()),
}
small = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def laid_out(net: nn.Sequential, layout: torch.memory_format) -> nn.Sequential:
    return net.to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def printed(count: int, like: str) -> str:
    return f"{count / 1e6:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts_are_the_papers(name: str, millions: str) -> None:
    with torch.device("meta"):
        count = parameters(models.build(name))
    assert printed(count, millions) == millions


@pytest.mark.parametrize(("size", "millions"), WIDE.items())
def test_wide_resnet_counts_are_the_papers(size: tuple[int, int], millions: str) -> None:
    with torch.device("meta"):
        count = parameters(models.wide_resnet(*size))
    assert printed(count, millions) == millions


def test_children_are_the_blocks() -> None:
    lengths = {"resnet20": 11, "resnet1202": 602, "resnet18": 10, "wrn28-10": 14, "mlp": 4}
    with torch.device("meta"):
        assert {name: len(models.build(name)) for name in lengths} == lengths


@pytest.mark.parametrize("name", [n for n in models.names() if n != "resnet1202"])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_output_shape(name: str, size: int) -> None:
    with torch.device("meta"):
        net = models.build(name, in_channels=1, num_classes=7, image_size=size)
        out = net(torch.empty(2, 1, size, size))
    assert out.shape == (2, 7)


def test_shapes_inside_the_network() -> None:
    """Three (four) groups, each of half the resolution and twice the channels."""
    x = images(2, 3, 28, 28)
    expected = {"resnet20": (64, 7), "resnet18": (512, 4), "wrn16-4": (256, 7)}
    for name, (channels, size) in expected.items():
        assert models.build(name)[:-1](x).shape == (2, channels, size, size)


@small
def test_gradient_reaches_every_parameter(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    net = make()
    x = images(4, 1, 16, 16).requires_grad_()
    torch.autograd.backward(nn.functional.cross_entropy(net(x), torch.arange(4)))
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@small
def test_gradient_is_the_derivative(make: Callable[[], nn.Sequential]) -> None:
    """An in-place operation on a value that is needed would give a wrong gradient, or none."""
    torch.manual_seed(0)
    net = make().double()
    x = images(4, 1, 16, 16, dtype=torch.float64)
    direction = images(4, 1, 16, 16, dtype=torch.float64, seed=1)

    def f(step: float) -> Tensor:
        total: Tensor = net(x + step * direction).square().sum()
        return total

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(f(0.0), x)
    with torch.no_grad():
        slope = (f(1e-7) - f(-1e-7)) / 2e-7
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@small
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cut_anywhere(
    make: Callable[[], nn.Sequential], training: bool, layout: torch.memory_format
) -> None:
    """Child by child, inputs detached between, is the whole net, and no input is written to."""
    torch.manual_seed(0)
    net = laid_out(make().double().train(training), layout)
    x = images(4, 1, 16, 16, dtype=torch.float64).contiguous(memory_format=layout)
    whole = net(x)
    torch.autograd.backward(whole.square().sum())
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()

    pieces: list[tuple[Tensor, Tensor]] = []
    for index, child in enumerate(net):
        given = x.detach().requires_grad_()
        # A leaf that requires grad would itself refuse to be written to; this clone would not.
        bare = given.detach().clone(memory_format=torch.preserve_format)
        before = bare.clone()
        running = {k: v.clone() for k, v in child.state_dict().items()}
        with torch.no_grad():
            free = child(bare)
        child.load_state_dict(running)
        assert torch.equal(bare, before), f"child {index} modified its input"
        assert bare._version == 0, f"child {index} wrote into its input"
        assert free.untyped_storage().data_ptr() != bare.untyped_storage().data_ptr(), index
        x = child(given)
        assert x.dtype == torch.float64
        pieces.append((given, x))
    torch.testing.assert_close(x, whole)

    gradient = 2 * x.detach()
    for given, out in reversed(pieces):
        torch.autograd.backward(out, gradient)
        assert given.grad is not None
        gradient = given.grad
    got = [p.grad for p in net.parameters()]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [15, 16])
def test_channels_last_stays_channels_last(size: int) -> None:
    x = images(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    for name in ("resnet20", "resnet18", "wrn16-4"):
        net = laid_out(models.build(name), torch.channels_last)
        y = x
        for child in list(net)[:-1]:
            y = child(y)
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [7, 8])
def test_zero_pad_shortcut(layout: torch.memory_format, size: int) -> None:
    x = images(2, 4, size, size).contiguous(memory_format=layout)
    y = models.ZeroPadShortcut(3, 2)(x)
    half = (size + 1) // 2
    assert y.shape == (2, 7, half, half)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()
    if size % 2 == 0:
        assert y.is_contiguous(memory_format=layout)


def test_initialisation_keeps_the_scale() -> None:
    """He et al. 2015: deviation sqrt(2 / fan) for each weight, zero biases."""
    torch.manual_seed(0)
    net = models.build("resnet18")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.out_channels * module.kernel_size[0] ** 2
            assert module.bias is None
        elif isinstance(module, nn.Linear):
            fan = module.in_features
            assert not module.bias.any()
        else:
            continue
        assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.06)


def test_same_seed_same_network() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(models.build("wrn16-4"))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize(
    ("name", "near"), [("resnet-20", "resnet20"), ("WRN-28-10", "wrn28-10"), ("mpl", "mlp")]
)
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown model '{name}'. Did you mean '{near}'") as error:
        models.build(name)
    assert all(known in str(error.value) for known in models.names())


def test_unknown_name_like_none() -> None:
    with pytest.raises(ValueError, match=r"Unknown model '\?'. Known models: resnet20, "):
        models.build("?")


@pytest.mark.parametrize("what", ["in_channels", "num_classes", "image_size"])
def test_bad_sizes(what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} must be at least 1, got 0"):
        models.build("mlp", **{what: 0})


def test_bad_depths() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2 .* got 21"):
        models.cifar_resnet(21)
    with pytest.raises(ValueError, match=r"6n \+ 2 .* got 2\."):
        models.cifar_resnet(2)
    with pytest.raises(ValueError, match=r"6n \+ 4 .* got 4\."):
        models.wide_resnet(4, 1)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        models.wide_resnet(10, 0)
