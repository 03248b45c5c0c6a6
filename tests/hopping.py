"""A chain whose layers pass on several tensors, and the same chain passing on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from chains import CLASSES, FEATURES
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LAYERS = 5, 5
# What is passed on: what the layer computed, the first layer's output, a mask, a part of the input.
WIDTHS = [WIDTH, WIDTH, WIDTH, 3]


class Begin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.layer(x).tanh()
        return a * 2, a, (x[:, :WIDTH] > -1).long(), x[:, :3]


class Middle(nn.Module):
    """Uses ``a`` twice itself and hands it on; every other one changes its input in place."""

    def __init__(self, *, in_place: bool, noisy: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH + 3, WIDTH)
        self.in_place = in_place
        self.noise: nn.Module = nn.Identity()
        if noisy:
            self.noise = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.3))

    def forward(self, hop: Any) -> tuple[Tensor, ...]:
        b, a, mask, part = hop
        b = b.mul_(1.5) if self.in_place else b * 1.5
        b = self.noise(self.layer(torch.cat([b * a, part], dim=1))).tanh()
        return b * mask + a, a, mask, part


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * WIDTH + 3, CLASSES)

    def forward(self, hop: Any) -> Tensor:
        b, a, mask, part = hop
        logits: Tensor = self.layer(torch.cat([b, a * mask, part], dim=1))
        return logits


def hopping(*, noisy: bool = False) -> nn.Sequential:
    """A float64 chain of ``LAYERS`` children, which pass on four tensors."""
    torch.manual_seed(0)
    middle = [Middle(in_place=number == 1, noisy=noisy) for number in range(LAYERS - 2)]
    return nn.Sequential(Begin(), *middle, End()).double()


class Joined(nn.Module):
    """``inner``, taking and giving the tensors as columns of one."""

    def __init__(self, inner: nn.Module, *, first: bool, last: bool) -> None:
        super().__init__()
        self.inner = inner
        self.first = first
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        hop: Any = x
        if not self.first:
            b, a, mask, part = x.split(WIDTHS, dim=1)
            # In place a part of the one tensor would be changed.
            hop = b.clone(), a, mask.long(), part.detach()
        given = self.inner(hop)
        if self.last:
            return given  # type: ignore[no-any-return]
        return torch.cat([tensor.to(x.dtype) for tensor in given], dim=1)


def joined(model: nn.Sequential) -> nn.Sequential:
    """A chain of the children of ``model`` that passes on one tensor."""
    end = len(model) - 1
    return nn.Sequential(
        *(Joined(m, first=number == 0, last=number == end) for number, m in enumerate(model))
    )


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of a :func:`joined` chain with the names of the other."""
    return {name.replace(".inner.", "."): tensor for name, tensor in state.items()}


class Stateful(nn.Module):
    """Passes on a weight, which it uses too, and a buffer that every forward changes in place."""

    def __init__(self, *, own_memory: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, WIDTH)
        self.own_memory = own_memory
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        count: Any = self.count
        count += 1
        passed_on = self.layer.weight, count
        if not self.own_memory:
            passed_on = self.layer.weight * 1, count * 1
        return (self.layer(x).tanh(), *passed_on)


class Grow(nn.Module):
    """Computes with what :class:`Stateful` passed on."""

    def forward(self, hop: Any) -> Tensor:
        x, weight, count = hop
        out: Tensor = x @ weight @ weight.t() / count
        return out


class Fan(nn.Module):
    """Passes on what ``fan`` makes of its input."""

    def __init__(self, fan: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fan = fan

    def forward(self, hop: Any) -> Any:
        return self.fan(hop)


class Beside(nn.Module):
    """Computes with ``a`` and ``b`` of its input, and hands ``b`` through."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, outputs)

    def forward(self, hop: Any) -> Any:
        a, b = hop
        return self.layer((a + b).tanh()), b


FANS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "the same twice": (lambda x: (x, x), lambda hop: hop[0].tanh() + 2 * hop[1]),
    "the same twice, in place": (lambda x: [x, x], lambda hop: hop[0].mul_(3) + hop[1]),
    "views": (
        lambda x: (x, x[:, :2], x.t()),
        lambda h: h[0].tanh() + F.pad(h[1], (0, 3)) * h[2].t(),
    ),
    "expanded": (lambda x: (x, x[:, :1].expand(-1, 5)), lambda hop: hop[0] * hop[1]),
    "in place": (lambda x: {"a": x, "b": x * 2}, lambda hop: hop["b"].mul_(hop["a"])),
    "one in a list": (lambda x: [x], lambda hop: hop.pop().tanh()),
    "not used": (lambda x: (x, x * 2), lambda hop: hop[0].tanh()),
    "empty": (lambda x: (x, x.new_empty((0, 7, 5))), lambda hop: hop[0].view(-1, hop[1].shape[2])),
    "plain": (lambda x: (x, 2.0, None, x.shape), lambda hop: hop[0].reshape(hop[3]) * hop[1]),
    "complex": (
        lambda x: (x, torch.complex(x, 2 * x)),
        lambda hop: hop[0] + hop[1].abs() + (hop[1] * hop[1].conj()).real,
    ),
}


def fanned(name: str) -> nn.Sequential:
    """A float64 chain of five children: two of them pass on what is in ``FANS``."""
    torch.manual_seed(0)
    fan, join = FANS[name]
    ends = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
    return nn.Sequential(ends[0], Fan(fan), Fan(lambda hop: hop), Fan(join), ends[1]).double()
