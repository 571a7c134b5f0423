"""The dense layers on top of AlexNet and VGG.

In: settings, a network of torchvision and its convolutional part. Out: the same network with a pool
and two hidden layers of the configured size. Must not know which of the networks it is.

    C channels and H by W pixels of the last feature map
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from models.blocks.transfer import WIDTH_DIVISORS, Pretrained, check_choice, check_shares
from models.core.errors import UsageError


@dataclass(frozen=True)
class HiddenLayersConfig(Pretrained):
    hidden: int = 4096
    """Units of each of the two dense layers."""
    width_divisor: int = 1
    """Divides the channels of every convolution: 1, 2, 4 or 8."""
    dropout: float = 0.5
    """Dropout rate at each dense layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise UsageError(f"model.hidden = {self.hidden}", hint="give 1 or more, like 4096")
        check_choice("width_divisor", self.width_divisor, WIDTH_DIVISORS)
        check_shares(self, "dropout")


def replace_hidden_layers(
    net: nn.Module,
    map_shape: Sequence[int],
    *,
    hidden: int,
    positions: tuple[int, int],
    largest: int,
) -> nn.Sequential:
    """Sets `net.avgpool`, and the layers of `net.classifier` at `positions`, for a feature map of
    shape (C, H, W), pooled to at most `largest` pixels a side. Returns the classifier."""
    channels, *sides = map_shape
    height, width = (min(largest, side) for side in sides)
    net.avgpool = nn.AdaptiveAvgPool2d((height, width))
    classifier = net.get_submodule("classifier")
    assert isinstance(classifier, nn.Sequential)
    first, second = positions
    classifier[first] = nn.Linear(channels * height * width, hidden)
    classifier[second] = nn.Linear(hidden, hidden)
    return classifier
