"""VGG networks of 11, 13, 16 and 19 layers, with or without batch norm.

The networks are torchvision's (BSD-3-Clause), and its weights can be loaded: Simonyan and
Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014. For images
under 96 pixels, pools that would leave less than 2x2 pixels are left out.

    B images, C channels, H height, W width, K classes, S side of the last map, at most 7

    image (B, C, H, W) -> features (B, 512, S, S) -> two layers of `hidden` -> logits (B, K)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from models.blocks.classifier import sgd_defaults, sgd_search_space
from models.blocks.hidden_layers import HiddenLayersConfig, replace_hidden_layers
from models.blocks.transfer import Transfer, check_choice, keep_map_sizes
from models.core.family import DataSpec
from models.core.spaces import Choice, Space, Uniform

DEPTHS = {11: "A", 13: "B", 16: "D", 19: "E"}
"""Layers, and the paper's letter for them."""


@dataclass(frozen=True)
class VggConfig(HiddenLayersConfig):
    depth: int = 16
    """Layers with weights: 11, 13, 16 or 19."""
    norm: bool = True
    """Batch norm after each convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("depth", self.depth, DEPTHS)


class Vgg(Transfer[VggConfig]):
    heads = ("classifier.6", "classifier.3", "classifier.0")
    variants = {
        "base": VggConfig(),
        "tiny": VggConfig(depth=11, hidden=64, width_divisor=8, dropout=0.0),
        "small": VggConfig(depth=11, hidden=512, width_divisor=2),
        **{f"vgg{depth}": VggConfig(depth=depth, norm=False) for depth in DEPTHS},
        **{f"vgg{depth}-bn": VggConfig(depth=depth) for depth in DEPTHS},
    }
    defaults = {**sgd_defaults(0.05), "train.clip_norm": 1.0}
    variant_defaults = {f"vgg{depth}": {"optim.model.lr": 0.01} for depth in DEPTHS}

    def build(self, config: VggConfig, data: DataSpec) -> nn.Module:
        from torchvision.models import vgg

        with torch.device("meta"):  # its 120 million weights are replaced, so don't draw them
            net: nn.Module = vgg.VGG(nn.Identity(), len(data.classes), False, config.dropout)
        divisor = config.width_divisor
        layers = [w if w == "M" else w // divisor for w in vgg.cfgs[DEPTHS[config.depth]]]
        features = vgg.make_layers(layers, batch_norm=config.norm)
        features[0] = nn.Conv2d(data.channels, features[0].out_channels, 3, padding=1)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        keep_map_sizes(features, data)
        net.features = features
        with torch.no_grad():
            map_shape = features.eval()(torch.zeros(1, *data.shape)).shape[1:]
        features.train()
        classifier = replace_hidden_layers(
            net, map_shape, hidden=config.hidden, positions=(0, 3), largest=7
        )
        classifier[6] = nn.Linear(config.hidden, len(data.classes))
        return net

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(0.2),
            "model.dropout": Uniform(0.0, 0.7),
            "model.depth": Choice((11, 16)),
        }


FAMILY = Vgg()
