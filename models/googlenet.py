"""GoogLeNet: blocks of parallel convolutions, and two auxiliary heads during training.

The network is torchvision's (BSD-3-Clause), with batch norm, and its weights can be loaded: Szegedy
et al., Going Deeper with Convolutions, 2015. The weighted losses of the two auxiliary heads are
added in training, as in the paper; predictions don't use them. For images under 96 pixels the first
convolution is 3x3 without stride and without pool.

    B images, C channels, H height, W width, K classes

    image (B, C, H, W) -> stem -> inception 3a, 3b -> 4a … 4e -> 5a, 5b -> global average pool
    -> logits (B, K); in training also those of the heads after 4a and 4d
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.blocks.classifier import sgd_defaults, sgd_search_space
from models.blocks.transfer import (
    WIDTH_DIVISORS,
    PretrainedWithStem,
    Transfer,
    check_choice,
    check_shares,
    is_small,
    keep_map_sizes,
)
from models.core.family import Batch, DataSpec, Losses
from models.core.spaces import Choice, Space, Uniform

AUXILIARY_WEIGHT = 0.3
"""As in the paper."""


@dataclass(frozen=True)
class GoogLeNetConfig(PretrainedWithStem):
    auxiliary: bool = True
    """Train with the two auxiliary heads."""
    width_divisor: int = 1
    """Divides the channels of every layer: 1, 2, 4 or 8."""
    dropout: float = 0.2
    """Dropout rate before the head."""
    auxiliary_dropout: float = 0.7
    """Dropout rate in the auxiliary heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("width_divisor", self.width_divisor, WIDTH_DIVISORS)
        check_shares(self, "dropout", "auxiliary_dropout")


class GoogLeNet(Transfer[GoogLeNetConfig]):
    heads = ("fc", "aux1", "aux2")
    variants = {
        "base": GoogLeNetConfig(),
        "tiny": GoogLeNetConfig(width_divisor=8, dropout=0.0, auxiliary_dropout=0.0),
        "small": GoogLeNetConfig(width_divisor=2),
        "plain": GoogLeNetConfig(auxiliary=False),
    }
    defaults = sgd_defaults(0.05)

    def build(self, config: GoogLeNetConfig, data: DataSpec) -> nn.Module:
        import torchvision
        from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux

        def narrow(channels: int) -> int:
            return channels // config.width_divisor

        def convolution(in_channels: int, out_channels: int, **options: Any) -> nn.Module:
            first = in_channels == 3
            if first and is_small(config.stem, data):
                options = {"kernel_size": 3, "padding": 1}
            before = data.channels if first else narrow(in_channels)
            layer: nn.Module = BasicConv2d(before, narrow(out_channels), **options)
            return layer

        def inception(*channels: int) -> nn.Module:
            block: nn.Module = Inception(*map(narrow, channels))
            return block

        def auxiliary(in_channels: int, classes: int, dropout: float) -> nn.Module:
            head: nn.Module = InceptionAux(narrow(in_channels), classes, dropout=dropout)
            if config.width_divisor > 1:
                head.conv = BasicConv2d(narrow(in_channels), narrow(128), kernel_size=1)
                head.fc1 = nn.Linear(narrow(2048), narrow(1024))
                head.fc2 = nn.Linear(narrow(1024), classes)
            return head

        net: nn.Module = torchvision.models.GoogLeNet(
            num_classes=len(data.classes),
            aux_logits=config.auxiliary,
            init_weights=False,
            blocks=[convolution, inception, auxiliary],
            dropout=config.dropout,
            dropout_aux=config.auxiliary_dropout,
        )
        if config.width_divisor > 1:
            net.fc = nn.Linear(narrow(1024), len(data.classes))
        if is_small(config.stem, data):
            net.maxpool1 = nn.Identity()
        keep_map_sizes(net, data)
        return net

    def loss(self, module: nn.Module, batch: Batch) -> Losses:
        """The loss of the logits, in training plus that of the auxiliary heads; `main_loss` is
        that of the logits alone."""
        outputs = module(batch["image"])
        if isinstance(outputs, Tensor):
            logits, others = outputs.float(), []
        else:
            logits, *others = (o.float() for o in outputs if o is not None)
        main = self.class_loss(logits, batch)
        added = [AUXILIARY_WEIGHT * self.class_loss(other, batch) for other in others]
        correct = (logits.argmax(1) == batch["label"]).float()
        return {"loss": sum(added, start=main), "main_loss": main, "accuracy": correct.mean()}

    def search_space(self) -> Mapping[str, Space]:
        return {
            **sgd_search_space(0.5),
            "model.dropout": Uniform(0.0, 0.5),
            "model.auxiliary": Choice((True, False)),
        }


FAMILY = GoogLeNet()
