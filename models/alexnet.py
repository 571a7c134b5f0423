"""AlexNet, with a first layer that also takes small images.

The network is torchvision's (BSD-3-Clause), and its weights can be loaded: Krizhevsky, One weird
trick for parallelizing convolutional neural networks, 2014, after Krizhevsky et al., ImageNet
Classification with Deep Convolutional Neural Networks, 2012. For images under 96 pixels the first
convolution is 5x5 without stride, and pools that would leave less than 2x2 pixels are left out.
Weights are initialised as in He et al., Delving Deep into Rectifiers, 2015: with PyTorch's default,
a short training learns nothing.

    B images, C channels, H height, W width, K classes, S side of the last map, at most 6

    image (B, C, H, W) -> features (B, 256, S, S) -> two layers of `hidden` -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from models.blocks.classifier import sgd_defaults, sgd_search_space
from models.blocks.hidden_layers import HiddenLayersConfig, replace_hidden_layers
from models.blocks.transfer import Stem, Transfer, check_choice, is_small, keep_map_sizes
from models.core.family import DataSpec
from models.core.spaces import Choice, Space, Uniform


@dataclass(frozen=True)
class AlexNetConfig(HiddenLayersConfig):
    stem: Stem = "auto"
    """The first convolution: "large" is 11x11 with stride 4, "small" is 5x5 without stride; "auto"
    takes "small" for images with a side under 96 pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stem", self.stem, get_args(Stem))


class AlexNet(Transfer[AlexNetConfig]):
    heads = ("classifier.6", "classifier.4", "classifier.1")
    variants = {
        "base": AlexNetConfig(),
        "tiny": AlexNetConfig(hidden=64, width_divisor=8, dropout=0.0),
        "small": AlexNetConfig(hidden=512, width_divisor=2),
    }
    defaults = {**sgd_defaults(0.02), "train.clip_norm": 1.0}

    def build(self, config: AlexNetConfig, data: DataSpec) -> nn.Module:
        import torchvision

        with torch.device("meta"):  # its 61 million weights are replaced, so don't draw them
            net: nn.Module = torchvision.models.AlexNet(len(data.classes), config.dropout)
        features = net.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        channels = data.channels
        for i, layer in enumerate(features):
            if isinstance(layer, nn.Conv2d):
                small = i == 0 and is_small(config.stem, data)
                kernel, stride = (5, 1) if small else (layer.kernel_size[0], layer.stride[0])
                padding = 2 if small else int(layer.padding[0])
                out_channels = layer.out_channels // config.width_divisor
                features[i] = nn.Conv2d(channels, out_channels, kernel, stride, padding)
                channels = out_channels
        keep_map_sizes(features, data)
        with torch.no_grad():
            map_shape = features(torch.zeros(1, *data.shape)).shape[1:]
        classifier = replace_hidden_layers(
            net, map_shape, hidden=config.hidden, positions=(1, 4), largest=6
        )
        for layer in (*features, classifier[1], classifier[4]):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        classifier[6] = nn.Linear(config.hidden, len(data.classes))
        return net

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(0.1),
            "model.dropout": Uniform(0.0, 0.7),
            "model.hidden": Choice((256, 1024, 4096)),
        }


FAMILY = AlexNet()
