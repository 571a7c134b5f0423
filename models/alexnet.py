"""AlexNet, with a first layer that also takes small images.

The network is torchvision's (BSD-3-Clause), and its weights fit it: Krizhevsky, One weird trick for
parallelizing convolutional neural networks, 2014, after Krizhevsky et al., ImageNet Classification
with Deep Convolutional Neural Networks, 2012. For images under 96 pixels the first convolution is
5x5 without stride, and pools that would leave less than 2x2 pixels are left out. Weights begin as in
He et al., Delving Deep into Rectifiers, 2015: with torch's own, a short training learns nothing.

    B images, C channels, H height, W width, K classes, S side of the last map, at most 6

    image (B, C, H, W) -> features (B, 256, S, S) -> two layers of `hidden` -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from models.blocks.transfer import (
    NARROW,
    Pretrained,
    Stem,
    Transfer,
    check_choice,
    check_shares,
    is_small,
    keep_maps,
)
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform


@dataclass(frozen=True)
class AlexNetConfig(Pretrained):
    """`hidden`: width of the two dense layers. `narrow`: divides the width of every convolution.
    `dropout`: before each of the dense layers. `stem`: "small" is 5x5, "large" 11x11 with stride
    4."""

    hidden: int = 4096
    narrow: int = 1
    dropout: float = 0.5
    stem: Stem = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise UsageError(f"model.hidden = {self.hidden}", hint="give 1 or more, like 4096")
        check_choice("narrow", self.narrow, NARROW)
        check_choice("stem", self.stem, get_args(Stem))
        check_shares(self, "dropout")


class AlexNet(Transfer[AlexNetConfig]):
    heads = ("classifier.6", "classifier.4", "classifier.1")
    variants = {
        "base": AlexNetConfig(),
        "tiny": AlexNetConfig(hidden=64, narrow=8, dropout=0.0),
        "small": AlexNetConfig(hidden=512, narrow=2),
    }
    defaults = {
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.02,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.1,
        "train.clip_norm": 1.0,
    }

    def build(self, config: AlexNetConfig, data: DataSpec) -> nn.Module:
        import torchvision

        with torch.device("meta"):  # its 61 million weights are replaced, not drawn
            net: nn.Module = torchvision.models.AlexNet(len(data.classes), config.dropout)
        features = net.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        channels = data.channels
        for place, layer in enumerate(features):
            if isinstance(layer, nn.Conv2d):
                small = place == 0 and is_small(config.stem, data)
                kernel, stride = (5, 1) if small else (layer.kernel_size[0], layer.stride[0])
                pad = 2 if small else int(layer.padding[0])
                maps = layer.out_channels // config.narrow
                features[place] = nn.Conv2d(channels, maps, kernel, stride, pad)
                channels = maps
        keep_maps(features, data)
        with torch.no_grad():
            sides = features(torch.zeros(1, *data.shape)).shape[-2:]
        height, width = (min(6, side) for side in sides)
        net.avgpool = nn.AdaptiveAvgPool2d((height, width))
        classifier = net.get_submodule("classifier")
        assert isinstance(classifier, nn.Sequential)
        classifier[1] = nn.Linear(channels * height * width, config.hidden)
        classifier[4] = nn.Linear(config.hidden, config.hidden)
        for layer in (*features, classifier[1], classifier[4]):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        classifier[6] = nn.Linear(config.hidden, len(data.classes))
        return net

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-3, 0.1),
            "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.dropout": Uniform(0.0, 0.7),
            "model.hidden": Choice((256, 1024, 4096)),
        }


FAMILY = AlexNet()
