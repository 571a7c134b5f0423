"""Backbone: any network of torchvision by name, on small images, and errors for invalid names."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

import models
from models.backbone import BackboneConfig
from models.blocks.transfer import first_convolution, last_layer
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec

BACKBONE = models.get("backbone")
FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11", "vit_b_16",
)  # fmt: skip
"""One of each kind, the smallest."""


def spec(channels: int = 3, size: int = 32, classes: int = 5) -> DataSpec:
    names = tuple(str(k) for k in range(classes))
    return DataSpec("classification", channels, size, size, names)


def build(name: str, data: DataSpec, **settings) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONE.build(BackboneConfig(name=name, **settings), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_works_on_small_grey_images_and_loads_published_weights(name):
    import torchvision

    net = build(name, spec(channels=1))
    assert net.training
    assert net(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    settings = {"image_size": 32} if name.startswith("vit") else {}
    settings |= {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    published = torchvision.models.get_model(name, weights=None, **settings).state_dict()
    own = net.state_dict()
    differ = {n for n in published if own[n].shape != published[n].shape}
    heads = tuple(f"{head}." for head in BACKBONE.head_names(net))
    (first,) = {n for n in differ if not n.startswith(heads)}
    assert own[first].shape[1] == 1
    assert own.keys() == published.keys()


def test_the_stem_keeps_the_size_of_small_images():
    net, bare = build("resnet18", spec()), build("resnet18", spec(), adapt=False)
    image = torch.zeros(1, 3, 32, 32)
    assert net.maxpool(net.conv1(image)).shape[-1] == 32
    assert bare.maxpool(bare.conv1(image)).shape[-1] == 8
    large = build("resnet18", spec(size=96))
    assert repr(large) == repr(bare)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5"])
def test_norms_adapt_in_a_short_training(name):
    """After 50 steps on the same images, the norms have their statistics."""
    torch.manual_seed(1)
    images = 3 + torch.randn(16, 3, 32, 32)

    def share_learned(adapt: bool) -> float:
        net = build(name, spec(), adapt=adapt)
        norm = next(layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))
        with torch.no_grad():
            for _ in range(50):
                net(images)
            mean = net.get_submodule(first_convolution(net))(images).mean((0, 2, 3))
        return float(norm.running_mean.norm() / mean.norm())

    assert share_learned(adapt=True) > 0.99
    assert share_learned(adapt=False) < 0.5


@pytest.mark.slow
def test_the_head_is_detected():
    heads = {"resnet18": "fc", "squeezenet1_1": "classifier.1", "vit_b_16": "heads.head"}
    for name, head in heads.items():
        assert last_layer(build(name, spec())) == head


@pytest.mark.parametrize(
    ("name", "near"), [("resnet19", "resnet18"), ("mobilenet_v3_smal", "mobilenet_v3_small")]
)
def test_an_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        build(name, spec())


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("vit_b_16", spec(size=28), "indivisible by patch size"),
        ("vit_b_16", DataSpec("classification", 3, 32, 16, ("a", "b")), "square"),
        ("maxvit_t", spec(size=32), "not divisible by partition size"),
        ("inception_v3", spec(size=32), "output size"),
    ],
)
def test_an_image_size_that_does_not_work_is_refused(name, data, why):
    with pytest.raises(UsageError, match=why) as raised:
        build(name, data)
    assert "data.height" in raised.value.hint


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_the_error_names_the_extra():
    with pytest.raises(TesseraError, match=r"tessera-train\[timm\]"):
        build("timm/resnet18", spec())
    assert "timm" not in sys.modules


def test_networks_of_timm_train():
    pytest.importorskip("timm")
    net = build("timm/resnet18", spec(channels=1))
    assert net(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        build("timm/resnet_18", spec())
