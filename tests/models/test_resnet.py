"""ResNet: stems, dropout and frozen stages. blocks/test_transfer.py tests the weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from models.resnet import ResNetConfig

RESNET = models.get("resnet")


def spec(channels: int = 3, size: int = 32, classes: int = 10) -> DataSpec:
    names = tuple(str(k) for k in range(classes))
    return DataSpec("classification", channels, size, size, names)


def tiny(data: DataSpec, **settings) -> tuple[ResNetConfig, nn.Module]:
    config = ResNetConfig(blocks=(1, 1), **settings)
    return config, RESNET.build(config, data)


@pytest.mark.parametrize(
    ("size", "stem", "kernel", "side"),
    [(32, "auto", 3, 32), (95, "auto", 3, 95), (96, "auto", 7, 24), (32, "large", 7, 8),
     (96, "small", 3, 96)],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_stem_follows_the_image_size(size, stem, kernel, side, channels):
    data = spec(channels, size)
    _, net = tiny(data, stem=stem)
    assert net.conv1.kernel_size == (kernel, kernel)
    with torch.no_grad():
        images = torch.randn(1, *data.shape)
        assert net.maxpool(net.conv1(images)).shape[-2:] == (side, side)
        assert net.eval()(images).shape == (1, 10)


def test_dropout_is_active_in_training_only():
    _, net = tiny(spec(), dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    net.eval()
    assert torch.equal(net(images), net(images))
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(net(images), net(images))


def test_weights_of_another_stem_are_refused(tmp_path):
    _, old = tiny(spec())
    save_file(old.state_dict(), tmp_path / "w.safetensors")
    config, new = tiny(spec(), stem="large", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(TesseraError, match=r"conv1\.weight \(64, 3, 3, 3\) for \(64, 3, 7, 7\)"):
        RESNET.warm_start(config, new)


def test_build_reads_no_weights(tmp_path):
    tiny(spec(), weights=str(tmp_path / "absent.safetensors"))


def test_freeze_backbone_trains_only_the_head():
    config, net = tiny(spec(), freeze="backbone")
    for epoch in (0, 50):
        frozen = RESNET.frozen(config, net, epoch)
        assert {n for n, _ in net.named_parameters()} - frozen == {"fc.weight", "fc.bias"}


def test_freeze_gradual_unfreezes_from_the_last_stage():
    config = ResNetConfig(freeze="gradual", unfreeze_every_epochs=2)
    with torch.device("meta"):
        net = RESNET.build(config, spec())
    parts = []
    for epoch in range(12):
        trained = {n for n, _ in net.named_parameters()} - RESNET.frozen(config, net, epoch)
        parts.append({name.partition(".")[0] for name in trained})
    stages = ["fc", "layer4", "layer3", "layer2", "layer1"]
    for epoch in range(10):
        assert parts[epoch] == set(stages[: epoch // 2 + 1])
    assert parts[10] == parts[11] == {*stages, "conv1", "bn1"}


def test_nothing_is_frozen_by_default():
    config, net = tiny(spec())
    assert RESNET.frozen(config, net, 0) == frozenset()


@pytest.mark.parametrize(
    "settings",
    [{"blocks": ()}, {"blocks": (1,) * 5}, {"stem": "huge"}, {"freeze": "all"},
     {"unfreeze_every_epochs": 0}, {"dropout": -0.1}],
)  # fmt: skip
def test_invalid_settings_are_refused(settings):
    with pytest.raises(UsageError, match="model"):
        ResNetConfig(**settings)
