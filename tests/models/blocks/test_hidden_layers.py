"""The dense layers of AlexNet and VGG, for any size of the feature map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.blocks.hidden_layers import HiddenLayersConfig, replace_hidden_layers
from models.core.errors import UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.Identity())


@pytest.mark.parametrize(("side", "pooled"), [(3, 3), (9, 7)])
def test_small_maps_are_not_enlarged(side: int, pooled: int) -> None:
    net = Net()
    classifier = replace_hidden_layers(net, (5, side, side), hidden=4, positions=(0, 2), largest=7)
    assert classifier is net.classifier
    x = net.avgpool(torch.zeros(2, 5, side, side))
    assert x.shape == (2, 5, pooled, pooled)
    assert classifier(x.flatten(1)).shape == (2, 4)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"width_divisor": 3}, {"dropout": 1.5}])
def test_settings_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        HiddenLayersConfig(**wrong)
