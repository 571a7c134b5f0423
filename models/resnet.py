"""Residual networks of 18, 34 and 50 layers, from scratch or pretrained.

The networks are torchvision's (BSD-3-Clause), after He et al., Deep Residual Learning for Image
Recognition, 2015, and its weights can be loaded. For images under 96 pixels the first convolution
is 3x3 without stride and without pool, as in that paper's networks for CIFAR-10.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> stem -> layer1 … layer4 -> global average pool -> fc -> logits (B, K)

Transfer learning: `--set model.weights=FILE_OR_URL --set model.freeze=backbone` trains a new head
on pretrained features; `freeze=gradual` then unfreezes the stages one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from models.blocks.classifier import sgd_defaults, sgd_search_space
from models.blocks.transfer import PretrainedWithStem, Transfer, check_shares, is_small
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Space, Uniform

FreezeStages = Literal["none", "backbone", "gradual"]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class ResNetConfig(PretrainedWithStem):
    freeze: FreezeStages = "none"  # type: ignore[assignment]
    """"backbone" trains only the head; "gradual" begins like that and unfreezes one more stage,
    from the last to the first, after every `unfreeze_every_epochs`. Both need `weights`."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks of each stage, one to four stages."""
    bottleneck: bool = False
    """Blocks of three convolutions instead of two."""
    dropout: float = 0.0
    """Dropout rate before the head."""
    unfreeze_every_epochs: int = 1
    """With `freeze="gradual"`: epochs until the next stage is trained too."""

    freeze_choices: ClassVar[Sequence[str]] = get_args(FreezeStages)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.blocks) <= 4 or min(self.blocks) < 1:
            raise UsageError(f"model.blocks = {list(self.blocks)}", hint="like [2, 2, 2, 2]")
        check_shares(self, "dropout")
        if self.unfreeze_every_epochs < 1:
            raise UsageError("model.unfreeze_every_epochs is at least 1")


class ResNet(Transfer[ResNetConfig]):
    heads = ("fc",)
    variants = {
        "base": ResNetConfig(),
        "tiny": ResNetConfig(blocks=(1, 1)),
        "resnet18": ResNetConfig(),
        "resnet34": ResNetConfig(blocks=(3, 4, 6, 3)),
        "resnet50": ResNetConfig(blocks=(3, 4, 6, 3), bottleneck=True),
    }
    defaults = sgd_defaults(0.1)

    def build(self, config: ResNetConfig, data: DataSpec) -> nn.Module:
        from torchvision.models import resnet

        block = resnet.Bottleneck if config.bottleneck else resnet.BasicBlock
        blocks = [*config.blocks, 1, 1, 1][:4]
        net: nn.Module = resnet.ResNet(block, blocks, num_classes=len(data.classes))
        for stage in range(len(config.blocks), 4):
            setattr(net, f"layer{stage + 1}", nn.Identity())
        if is_small(config.stem, data):
            net.conv1 = _convolution(data.channels, kernel=3, stride=1)
            net.maxpool = nn.Identity()
        elif data.channels != 3:
            net.conv1 = _convolution(data.channels, kernel=7, stride=2)
        features = 64 * 2 ** (len(config.blocks) - 1) * block.expansion
        if len(config.blocks) < 4:
            net.fc = nn.Linear(features, len(data.classes))
        if config.dropout:
            net.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(config.dropout))
        return net

    def frozen(self, config: ResNetConfig, module: nn.Module, epoch: int) -> frozenset[str]:
        if config.freeze == "none":
            return frozenset()
        stages = [s for s in STAGES if s == "stem" or len(config.blocks) >= int(s[-1])]
        trained = epoch // config.unfreeze_every_epochs if config.freeze == "gradual" else 0
        frozen = set(stages[: max(0, len(stages) - trained)])
        return frozenset(n for n, _ in module.named_parameters() if _stage(n) in frozen)

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(1.0),
            "schedule.warmup": Uniform(0.0, 0.3),
            "model.dropout": Uniform(0.0, 0.5),
        }


def _convolution(channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _stage(parameter: str) -> str:
    """The stage that a parameter belongs to; "fc" for the head."""
    first = parameter.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


FAMILY = ResNet()
