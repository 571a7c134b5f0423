"""Residual networks of 18, 34 and 50 layers, new or pretrained.

The networks are torchvision's (BSD-3-Clause), after He et al., Deep Residual Learning for Image
Recognition, 2015, and its weights fit them. For images under 96 pixels the first convolution is
3x3 without stride and without pool, as that article has it for CIFAR-10.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> stem -> layer1 … layer4 -> mean over the map -> fc -> logits (B, K)

Transfer learning: `--set model.weights=FILE_OR_URL --set model.freeze=backbone` trains a new head
on pretrained features; `freeze=gradual` then frees the stages one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from models.blocks.classifier import Classifier
from models.blocks.transfer import Stem, is_small
from models.core.errors import UsageError
from models.core.family import DataSpec
from models.core.spaces import Choice, LogUniform, Space, Uniform
from models.core.weights import load_weights, read_weights

Freeze = Literal["none", "backbone", "gradual"]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class ResNetConfig:
    """`blocks`: residual blocks of each stage, up to four; fewer stages make a smaller network.
    `bottleneck`: blocks of three convolutions instead of two. `stem`: "small" is 3x3, "large" is
    7x7 and a pool. `dropout`: share of features before the head.

    `weights`: path, or http(s) or file address, of a `.safetensors` file or a `.pth` state dict;
    it is read once, when a training begins, and nothing of it is executed or kept on disk. The head
    stays new where its shape differs; for grey images the first kernels are summed over their
    colours. `weights_sha256` is compared when given. `freeze`:
    "backbone" trains the head only; "gradual" begins so and frees one more stage, from the top,
    after every `unfreeze_every_epochs`."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    stem: Stem = "auto"
    dropout: float = 0.0
    weights: str = ""
    weights_sha256: str = ""
    freeze: Freeze = "none"
    unfreeze_every_epochs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= len(self.blocks) <= 4 or min(self.blocks) < 1:
            raise UsageError(f"model.blocks = {list(self.blocks)}", hint="like [2, 2, 2, 2]")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.dropout = {self.dropout}", hint="give 0 or more, below 1")
        if self.unfreeze_every_epochs < 1:
            raise UsageError("model.unfreeze_every_epochs is at least 1")
        for name, kind in {"stem": Stem, "freeze": Freeze}.items():
            if getattr(self, name) not in get_args(kind):
                raise UsageError(
                    f"model.{name} = {getattr(self, name)!r}",
                    hint=f"give one of: {', '.join(get_args(kind))}",
                )


class ResNet(Classifier[ResNetConfig]):
    variants = {
        "base": ResNetConfig(),
        "tiny": ResNetConfig(blocks=(1, 1)),
        "resnet18": ResNetConfig(),
        "resnet34": ResNetConfig(blocks=(3, 4, 6, 3)),
        "resnet50": ResNetConfig(blocks=(3, 4, 6, 3), bottleneck=True),
    }
    defaults = {
        "optim.model.kind": "sgd",
        "optim.model.lr": 0.1,
        "optim.model.nesterov": True,
        "optim.model.weight_decay": 5e-4,
        "schedule.kind": "cosine",
        "schedule.warmup": 0.1,
    }

    def build(self, config: ResNetConfig, data: DataSpec) -> nn.Module:
        from torchvision.models import resnet

        block = resnet.Bottleneck if config.bottleneck else resnet.BasicBlock
        blocks = [*config.blocks, 1, 1, 1][:4]
        net: nn.Module = resnet.ResNet(block, blocks, num_classes=len(data.classes))
        for place in range(len(config.blocks), 4):
            setattr(net, f"layer{place + 1}", nn.Identity())
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

    def warm_start(self, config: ResNetConfig, module: nn.Module) -> None:
        if not config.weights:
            if config.freeze != "none":
                raise UsageError(
                    f"model.freeze = {config.freeze!r} would keep a network that has learned nothing",
                    hint="name weights: --set model.weights=FILE_OR_URL",
                )
            return
        tensors = read_weights(config.weights, config.weights_sha256)
        own, given = module.state_dict()["conv1.weight"], tensors.get("conv1.weight")
        if own.shape[1] == 1 and given is not None and given.ndim == 4 and given.shape[1] == 3:
            tensors["conv1.weight"] = given.sum(1, keepdim=True)
        load_weights(module, tensors, "fc", config.weights)

    def frozen(self, config: ResNetConfig, module: nn.Module, epoch: int) -> frozenset[str]:
        if config.freeze == "none":
            return frozenset()
        stages = [s for s in STAGES if s == "stem" or len(config.blocks) >= int(s[-1])]
        freed = epoch // config.unfreeze_every_epochs if config.freeze == "gradual" else 0
        kept = set(stages[: max(0, len(stages) - freed)])
        return frozenset(n for n, _ in module.named_parameters() if _stage(n) in kept)

    def search_space(self) -> Mapping[str, Space]:
        return {
            "optim.model.lr": LogUniform(1e-3, 1.0),
            "optim.model.weight_decay": LogUniform(1e-5, 1e-2),
            "train.batch_size": Choice((64, 128, 256)),
            "schedule.warmup": Uniform(0.0, 0.3),
            "augment.label_smoothing": Uniform(0.0, 0.2),
            "model.dropout": Uniform(0.0, 0.5),
        }


def _convolution(channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _stage(parameter: str) -> str:
    """The stage that a parameter is of; "fc" for the head."""
    first = parameter.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


FAMILY = ResNet()
