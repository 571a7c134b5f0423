"""The networks are torchvision's; stems follow the size; transfer learning, step by step."""

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


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_takes_torchvisions_weights(name):
    import torchvision

    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None)
        ours = RESNET.build(RESNET.variants[name], spec(size=224, classes=1000))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("size", "stem", "kernel", "side"),
    [(32, "auto", 3, 32), (95, "auto", 3, 95), (96, "auto", 7, 24), (32, "large", 7, 8),
     (96, "small", 3, 96)],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_stem_follows_the_size(size, stem, kernel, side, channels):
    data = spec(channels, size)
    _, net = tiny(data, stem=stem)
    assert net.conv1.kernel_size == (kernel, kernel)
    with torch.no_grad():
        images = torch.randn(1, *data.shape)
        assert net.maxpool(net.conv1(images)).shape[-2:] == (side, side)
        assert net.eval()(images).shape == (1, 10)


def test_dropout_is_before_the_head():
    _, net = tiny(spec(), dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    net.eval()
    assert torch.equal(net(images), net(images))
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(net(images), net(images))


def pretrained(tmp_path, data: DataSpec) -> tuple[str, nn.Module]:
    torch.manual_seed(7)
    _, net = tiny(data)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors"), net


def test_new_head_on_old_features(tmp_path):
    source, old = pretrained(tmp_path, spec(classes=10))
    config, new = tiny(spec(classes=3), weights=source, freeze="backbone")
    head = new.fc.weight.clone()
    RESNET.warm_start(config, new)
    assert torch.equal(new.fc.weight, head)
    for name, value in new.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, old.state_dict()[name])


def test_the_same_classes_keep_their_head(tmp_path):
    source, old = pretrained(tmp_path, spec())
    config, new = tiny(spec(), weights=source)
    RESNET.warm_start(config, new)
    assert torch.equal(new.fc.weight, old.fc.weight)


def test_colour_weights_on_grey_images(tmp_path):
    """A grey image gives what its copy in three channels gives."""
    source, old = pretrained(tmp_path, spec(3))
    config, new = tiny(spec(1), weights=source)
    RESNET.warm_start(config, new)
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(grey), old.eval()(grey.expand(-1, 3, -1, -1)))


def test_weights_for_another_stem_are_refused_by_name(tmp_path):
    source, _ = pretrained(tmp_path, spec())
    config, new = tiny(spec(), stem="large", weights=source)
    with pytest.raises(TesseraError, match=r"conv1\.weight \(64, 3, 3, 3\) for \(64, 3, 7, 7\)"):
        RESNET.warm_start(config, new)


def test_build_reads_nothing(tmp_path):
    tiny(spec(), weights=str(tmp_path / "absent.safetensors"))


def test_freezing_what_has_learned_nothing_is_refused():
    config, net = tiny(spec(), freeze="backbone")
    with pytest.raises(UsageError, match="learned nothing"):
        RESNET.warm_start(config, net)


def test_backbone_leaves_the_head():
    config, net = tiny(spec(), freeze="backbone")
    for epoch in (0, 50):
        frozen = RESNET.frozen(config, net, epoch)
        assert {n for n, _ in net.named_parameters()} - frozen == {"fc.weight", "fc.bias"}


def test_gradual_frees_from_the_top():
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
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UsageError, match="model"):
        ResNetConfig(**settings)
