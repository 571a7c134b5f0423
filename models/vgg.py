"""VGG networks of 11, 13, 16 and 19 layers, with or without batch norm.

The networks are torchvision's (BSD-3-Clause), and its weights fit them: Simonyan and Zisserman, Very
Deep Convolutional Networks for Large-Scale Image Recognition, 2014. For images under 96 pixels, pools
that would leave less than 2x2 pixels are left out.

    B images, C channels, H height, W width, K classes, S side of the last map, at most 7

    image (B, C, H, W) -> features (B, 512, S, S) -> two layers of `hidden` -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from models.blocks.transfer import (
    NARROW,
    Pretrained,
    Transfer,
    check_choice,
    check_shares,
    keep_maps,
)
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform

DEPTHS = {11: "A", 13: "B", 16: "D", 19: "E"}
"""Layers, and the article's letter for them."""


@dataclass(frozen=True)
class VggConfig(Pretrained):
    """`depth`: layers with weights. `norm`: batch norm after each convolution. `hidden`: width of
    the two dense layers. `narrow`: divides the width of every convolution. `dropout`: after each of
    the dense layers."""

    depth: int = 16
    norm: bool = True
    hidden: int = 4096
    narrow: int = 1
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise UsageError(f"model.hidden = {self.hidden}", hint="give 1 or more, like 4096")
        check_choice("depth", self.depth, DEPTHS)
        check_choice("narrow", self.narrow, NARROW)
        check_shares(self, "dropout")


class Vgg(Transfer[VggConfig]):
    heads = ("classifier.6", "classifier.3", "classifier.0")
    variants = {
        "base": VggConfig(),
        "tiny": VggConfig(depth=11, hidden=64, narrow=8, dropout=0.0),
        "small": VggConfig(depth=11, hidden=512, narrow=2),
        **{f"vgg{depth}": VggConfig(depth=depth, norm=False) for depth in DEPTHS},
        **{f"vgg{depth}-bn": VggConfig(depth=depth) for depth in DEPTHS},
    }
    defaults = {
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.05,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.1,
        "train.clip_norm": 1.0,
    }
    variant_defaults = {f"vgg{depth}": {"optim.model.lr": 0.01} for depth in DEPTHS}

    def build(self, config: VggConfig, data: DataSpec) -> nn.Module:
        from torchvision.models import vgg

        with torch.device("meta"):  # its 120 million weights are replaced, not drawn
            net: nn.Module = vgg.VGG(nn.Identity(), len(data.classes), False, config.dropout)
        layers = [w if w == "M" else w // config.narrow for w in vgg.cfgs[DEPTHS[config.depth]]]
        features = vgg.make_layers(layers, batch_norm=config.norm)
        features[0] = nn.Conv2d(data.channels, features[0].out_channels, 3, padding=1)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        keep_maps(features, data)
        net.features = features
        with torch.no_grad():
            channels, *sides = features.eval()(torch.zeros(1, *data.shape)).shape[1:]
        features.train()
        height, width = (min(7, side) for side in sides)
        net.avgpool = nn.AdaptiveAvgPool2d((height, width))
        classifier = net.get_submodule("classifier")
        assert isinstance(classifier, nn.Sequential)
        classifier[0] = nn.Linear(channels * height * width, config.hidden)
        classifier[3] = nn.Linear(config.hidden, config.hidden)
        classifier[6] = nn.Linear(config.hidden, len(data.classes))
        return net

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-3, 0.2),
            "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.dropout": Uniform(0.0, 0.7),
            "model.depth": Choice((11, 16)),
        }


FAMILY = Vgg()
