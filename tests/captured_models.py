"""Models that cannot be given as an nn.Sequential, small, each with a batch's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import convnext, efficientnet, resnet, swin_transformer

Made = tuple[nn.Module, Any]

# -- torchvision's classification families: their own code, shallow and narrow where it lets us ---------


def _vgg(model: Any, linears: tuple[int, int, int], channels: int) -> nn.Module:
    """Without the hundred million weights behind the last convolution."""
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    for index, (inputs, outputs) in zip(linears, ((channels, 64), (64, 64), (64, 10)), strict=True):
        model.classifier[index] = nn.Linear(inputs, outputs)
    return model


def _resnet(block: type[nn.Module], **options: Any) -> nn.Module:
    return models.ResNet(block, [1, 2, 1, 1], num_classes=10, **options)


def _swin(**options: Any) -> nn.Module:
    return models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        dropout=0.1,
        stochastic_depth_prob=0.2,
        num_classes=10,
        **options,
    )


def _efficientnet() -> nn.Module:
    setting = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        efficientnet.FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        efficientnet.MBConvConfig(4, 3, 2, 16, 24, 2),
    ]
    return efficientnet.EfficientNet(setting, 0.2, stochastic_depth_prob=0.3, num_classes=10)


def _convnext() -> nn.Module:
    setting = [convnext.CNBlockConfig(8, 16, 2), convnext.CNBlockConfig(16, None, 2)]
    return convnext.ConvNeXt(setting, stochastic_depth_prob=0.3, num_classes=10)


def _maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 2],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=10,
    )


def _vit() -> nn.Module:
    model = models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=0.1,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight)  # which is zero, and so were all gradients behind it
    return model


def _densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2, 2), 16, drop_rate=0.1, num_classes=10)


_NO_AUX: dict[str, Any] = {"aux_logits": False, "init_weights": False, "num_classes": 10}

# How each is made, and the side of its input.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (lambda: _vgg(models.alexnet(), (1, 4, 6), 256), 64),
    "resnet": (lambda: _resnet(resnet.BasicBlock), 32),
    "resnext": (lambda: _resnet(resnet.Bottleneck, groups=8, width_per_group=4), 32),
    "wide_resnet": (lambda: _resnet(resnet.Bottleneck, width_per_group=128), 32),
    "vgg": (lambda: _vgg(models.vgg11_bn(init_weights=False), (0, 3, 6), 512), 32),
    "densenet": (_densenet, 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(width_mult=0.25, num_classes=10), 32),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=10), 32),
    "efficientnet": (_efficientnet, 32),
    "regnet": (lambda: models.regnet_y_400mf(num_classes=10), 32),
    "convnext": (_convnext, 32),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(num_classes=10), 32),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=10), 32),
    "googlenet": (lambda: models.googlenet(**_NO_AUX), 32),
    "inception": (lambda: models.inception_v3(**_NO_AUX), 75),
    "mnasnet": (lambda: models.mnasnet0_5(num_classes=10), 32),
    "vit": (_vit, 32),
    "swin": (_swin, 32),
    "swin_v2": (
        lambda: _swin(
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        ),
        32,
    ),
    "maxvit": (_maxvit, 64),
}


# -- others -----------------------------------------------------------------------------------------


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
        self.lstms = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
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
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

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
        return {
            "classes": self.classes(x),
            "box": (self.box(x).sigmoid(), None),
            "kind": "detection",
        }


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
    if name in OTHERS:
        return OTHERS[name]()
    make, side = FAMILIES[name]
    return make(), torch.randn(2, 3, side, side)
