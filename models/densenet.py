"""DenseNets: every layer of a block sees the outputs of all layers before it.

The networks are torchvision's (BSD-3-Clause), and its weights can be loaded: Huang et al., Densely
Connected Convolutional Networks, 2017. For images under 96 pixels the first convolution is 3x3
without stride and without pool, as in that paper's networks for CIFAR-10.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> stem -> blocks; between them size and channels are halved
    -> global average pool -> logits (B, K)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from models.blocks.classifier import sgd_defaults, sgd_search_space
from models.blocks.transfer import (
    PretrainedWithStem,
    Transfer,
    check_shares,
    is_small,
    keep_map_sizes,
)
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, Space, Uniform

_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


@dataclass(frozen=True)
class DenseNetConfig(PretrainedWithStem):
    blocks: tuple[int, ...] = (6, 12, 24, 16)
    """Layers of each block."""
    growth: int = 32
    """Channels that each layer adds."""
    features: int = 64
    """Channels after the first convolution."""
    dropout: float = 0.0
    """Dropout rate after each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks or min(self.blocks) < 1:
            raise UsageError(f"model.blocks = {list(self.blocks)}", hint="like [6, 12, 24, 16]")
        if self.growth < 1 or self.features < 2:
            raise UsageError("model.growth is at least 1 and model.features at least 2")
        check_shares(self, "dropout")


class DenseNet(Transfer[DenseNetConfig]):
    heads = ("classifier",)
    variants = {
        "base": DenseNetConfig(),
        "tiny": DenseNetConfig(blocks=(2, 2), growth=8, features=16),
        # the paper's for CIFAR-10: 40 and 100 layers
        "bc-40": DenseNetConfig(blocks=(6, 6, 6), growth=12, features=24),
        "bc-100": DenseNetConfig(blocks=(16, 16, 16), growth=12, features=24),
        "densenet121": DenseNetConfig(),
        "densenet161": DenseNetConfig(blocks=(6, 12, 36, 24), growth=48, features=96),
        "densenet169": DenseNetConfig(blocks=(6, 12, 32, 32)),
        "densenet201": DenseNetConfig(blocks=(6, 12, 48, 32)),
    }
    defaults = sgd_defaults(0.1)

    def build(self, config: DenseNetConfig, data: DataSpec) -> nn.Module:
        from torchvision.models import densenet

        net: nn.Module = densenet.DenseNet(
            growth_rate=config.growth,
            block_config=config.blocks,
            num_init_features=config.features,
            drop_rate=config.dropout,
            num_classes=len(data.classes),
        )
        features = net.get_submodule("features")
        small = is_small(config.stem, data)
        if small or data.channels != 3:
            kernel, stride = (3, 1) if small else (7, 2)
            stem = nn.Conv2d(
                data.channels, config.features, kernel, stride, kernel // 2, bias=False
            )
            nn.init.kaiming_normal_(stem.weight)
            features.conv0 = stem
        if small:
            features.pool0 = nn.Identity()
        keep_map_sizes(net, data)
        return net

    def rename(self, name: str, module: nn.Module) -> str:
        return _OLD_NAME.sub(r"\1", name)

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(1.0),
            "model.dropout": Uniform(0.0, 0.3),
            "model.growth": Choice((12, 24, 32)),
        }


FAMILY = DenseNet()
