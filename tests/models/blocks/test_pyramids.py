"""Feature pyramids: the sizes of their maps, and weights of other networks for them."""

from __future__ import annotations

import pytest
import torch

from models.blocks import pyramids
from models.core.errors import TesseraError
from models.core.family import DataSpec


def make(channels: int) -> torch.nn.Module:
    data = DataSpec("detection", channels, 32, 64, ("a",))
    return pyramids.small(data, channels=(8, 16), blocks=1, norm="group", features=4)


def test_each_level_has_half_the_size_of_the_one_before() -> None:
    maps = make(3)(torch.zeros(2, 3, 32, 64))
    assert [tuple(value.shape) for value in maps.values()] == [(2, 4, 8, 16), (2, 4, 4, 8)]


def test_the_weights_of_a_classifier_become_the_body() -> None:
    class Detector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = make(3)

    module = Detector()
    own = module.state_dict()
    name = "backbone.body.stem.0.weight"
    stem = torch.full_like(own[name], 2.0)
    classifier = {"stem.0.weight": stem, "fc.weight": torch.zeros(3)}
    fitted = pyramids.fit_weights(classifier, module, (), "a.safetensors")
    assert torch.equal(fitted[name], stem)
    assert all(torch.equal(fitted[n], t) for n, t in own.items() if ".fpn." in n)
    assert "backbone.body.fc.weight" not in fitted
    with pytest.raises(TesseraError, match=r"'a\.safetensors' are of another network"):
        pyramids.fit_weights({"conv.weight": stem}, module, (), "a.safetensors")
