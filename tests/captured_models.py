"""Models that cannot be given as an nn.Sequential, small, each with a batch's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, Any]

# The smallest member of each classification family, and a side its input may have.
FAMILIES = {
    "alexnet": 64,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "wide_resnet50_2": 32,
    "vgg11_bn": 32,
    "densenet121": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "vit_b_32": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "maxvit_t": 64,
}


def torchvision_model(name: str) -> Made:
    """A member of torchvision's families, with ten classes; small where its shape can be chosen."""
    torch.manual_seed(0)
    side = FAMILIES[name]
    options: dict[str, Any] = {"num_classes": 10, "weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    if name == "vit_b_32":
        options["image_size"] = side
    if name == "maxvit_t":
        model: nn.Module = torchvision.models.MaxVit(
            input_size=(side, side),
            stem_channels=8,
            partition_size=2,
            block_channels=[8, 16],
            block_layers=[1, 2],
            head_dim=8,
            stochastic_depth_prob=0.2,
            num_classes=10,
        )
    else:
        model = torchvision.models.get_model(name, **options)
    return model, torch.randn(2, 3, side, side)


class UNet(nn.Module):
    """Skips that are as long as the model; the decoder's activations work in place."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 16)) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        channels = 3
        for width in widths:
            self.down.append(_double(channels, width))
            channels = width
        self.bottom = _double(channels, 2 * channels)
        channels *= 2
        for width in reversed(widths):
            self.up.append(
                nn.ModuleDict(
                    {
                        "grow": nn.ConvTranspose2d(channels, width, 2, stride=2),
                        "mix": _double(2 * width, width),
                    }
                )
            )
            channels = width
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for block in self.up:
            x = block["grow"](x)
            x = block["mix"](torch.cat([skips.pop(), x], dim=1))
        return self.head(x)


def _double(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class MaskedEncoder(nn.Module):
    """nn.TransformerEncoder with a padding mask; ids and mask are two inputs, as keywords."""

    def __init__(self, layers: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)
        x = self.encoder(x, src_key_padding_mask=mask)
        keep = (~mask).unsqueeze(2).to(x.dtype)
        return self.head((x * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1))


class LstmLanguageModel(nn.Module):
    """State made from the batch's size; the state is returned too."""

    def __init__(self, words: int = 30, width: int = 12, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstms = nn.ModuleList(
            nn.LSTM(width, width, batch_first=True) for _ in range(layers)
        )
        self.dropout = nn.Dropout(0.2)
        self.decoder = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.dropout(self.embedding(ids))
        states = []
        for lstm in self.lstms:
            zero = torch.zeros(1, ids.size(0), lstm.hidden_size, device=ids.device)
            x, (hidden, _) = lstm(x, (zero, zero))
            x = self.dropout(x)
            states.append(hidden)
        return self.decoder(x), states


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.p = 0.1
        self.register_buffer("causal", torch.tril(torch.ones(length, length)).bool())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
        scores = F.dropout(scores.softmax(dim=-1), self.p, training=self.training)
        y = (scores @ v).transpose(1, 2).contiguous().view(batch, length, width)
        return self.out(y)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, length)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """A decoder in plain torch; with ``tied``, the head is the embedding's weight."""

    def __init__(self, *, tied: bool, words: int = 20, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(32, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, 2, 32) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length > len(self.positions):
            raise ValueError("too long")
        x = self.words(ids) + self.positions[torch.arange(length, device=ids.device)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TwoTower(nn.Module):
    """Two inputs, each with a tower of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.item = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u = F.normalize(self.user(user), dim=1)
        i = F.normalize(self.item(item), dim=1)
        return self.scale * (u @ i.t())


class DictModel(nn.Module):
    """Takes one dict and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.classes = nn.Linear(16, 4)
        self.box = nn.Linear(16, 4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = self.trunk(batch["x"] * batch["weight"].unsqueeze(1))
        return {"classes": self.classes(x), "box": (self.box(x).sigmoid(), None), "kind": "detection"}


def gpt(*, tied: bool) -> Made:
    return Gpt(tied=tied), torch.randint(20, (2, 9))


def masked_encoder() -> Made:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    return MaskedEncoder(), {"ids": torch.randint(50, (2, 7)), "mask": mask}


OTHERS: dict[str, Callable[[], Made]] = {
    "unet": lambda: (UNet(), torch.randn(2, 3, 16, 16)),
    "masked encoder": masked_encoder,
    "lstm": lambda: (LstmLanguageModel(), torch.randint(30, (2, 6))),
    "gpt": lambda: gpt(tied=False),
    "two towers": lambda: (TwoTower(), (torch.randn(5, 6), torch.randn(5, 10))),
    "dict": lambda: (DictModel(), {"x": torch.randn(3, 6), "weight": torch.rand(3)}),
}


def made(name: str) -> Made:
    """The model ``name`` of either table, seeded."""
    torch.manual_seed(0)
    return torchvision_model(name) if name in FAMILIES else OTHERS[name]()
