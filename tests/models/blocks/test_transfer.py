"""Small images in networks designed for large ones, and pretrained weights.

For every family that is built around a network of torchvision.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.blocks.transfer import keep_map_sizes
from models.core.errors import TesseraError, UsageError
from models.core.family import DataSpec

BUILT_AROUND = ("alexnet", "vgg", "googlenet", "densenet", "resnet", "backbone")


def spec(channels: int = 3, size: int = 32, classes: int = 10) -> DataSpec:
    names = tuple(str(k) for k in range(classes))
    return DataSpec("classification", channels, size, size, names)


def tiny(name: str, data: DataSpec, seed: int = 0, **settings):
    family = models.get(name)
    config = type(family.variants["tiny"])(**{**vars(family.variants["tiny"]), **settings})
    torch.manual_seed(seed)
    return family, config, family.build(config, data)


@pytest.mark.parametrize("name", [*BUILT_AROUND, "vit", "rnn"])
@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (1, 28, 28), (3, 32, 32), (1, 5, 9), (3, 1, 1), (3, 96, 96)]
)
def test_trains_on_a_single_image_of_any_size(name, shape):
    """A single image is the hard case: the last batch of an epoch can have one image, and batch
    norm needs more than one value in training."""
    data = DataSpec("classification", *shape, ("a", "b", "c"))
    family, _, net = tiny(name, data)
    count = 1 if min(shape[1:]) > 1 else 3
    batch = {"image": torch.randn(count, *shape), "label": torch.arange(count) % 3}
    loss = family.loss(net.train(), batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.slow
def test_torchvisions_own_networks_fail_on_small_images():
    """Control: without our changes they raise."""
    import torchvision

    for bare, size in ((torchvision.models.alexnet, 32), (torchvision.models.vgg11, 16)):
        with pytest.raises(RuntimeError, match="too small"):
            bare(num_classes=3)(torch.randn(1, 3, size, size))
    net = torchvision.models.resnet18(num_classes=3)
    with pytest.raises(ValueError, match="more than 1 value"):
        net(torch.randn(1, 3, 32, 32))
    keep_map_sizes(net, spec())
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_layers_are_unchanged_for_large_images_or_maps():
    import torchvision

    for size in (64, 96):
        net = torchvision.models.squeezenet1_1(num_classes=3)
        before = repr(net)
        keep_map_sizes(net, spec(size=size))
        assert repr(net) == before
        assert net.training


def test_layers_that_would_shrink_a_small_map_keep_its_size():
    net = nn.Sequential(nn.Conv2d(1, 2, 5, stride=2), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3))
    keep_map_sizes(net, spec(channels=1, size=8))
    # 8 -> 2 (stride kept), then neither a pool nor an unpadded convolution fits
    assert net(torch.randn(1, 1, 8, 8)).shape == (1, 2, 2, 2)
    assert (net[0].stride, net[1].stride, net[2].padding) == ((2, 2), 1, "same")


@pytest.mark.parametrize(
    ("family", "variant", "theirs"),
    [
        ("alexnet", "base", "alexnet"),
        ("googlenet", "base", "googlenet"),
        *(("resnet", f"resnet{depth}", f"resnet{depth}") for depth in (18, 34, 50)),
        *(("vgg", f"vgg{depth}", f"vgg{depth}") for depth in (11, 13, 16, 19)),
        *(("vgg", f"vgg{depth}-bn", f"vgg{depth}_bn") for depth in (11, 13, 16, 19)),
        *(("densenet", f"densenet{n}", f"densenet{n}") for n in (121, 161, 169, 201)),
    ],
)
def test_has_the_parameters_of_torchvisions_network(family, variant, theirs):
    """The same names and shapes, for images of the size the network was designed for."""
    import torchvision

    extra = {"init_weights": False} if theirs == "googlenet" else {}
    with torch.device("meta"):
        published = torchvision.models.get_model(theirs, weights=None, **extra)
        ours = models.get(family).build(
            models.get(family).variants[variant], spec(size=224, classes=1000)
        )
    shapes = {name: value.shape for name, value in published.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("name", [*BUILT_AROUND, "vit"])
class TestWeights:
    def stored(self, tmp_path, name: str, data: DataSpec) -> tuple[str, nn.Module]:
        _, _, net = tiny(name, data, seed=7)
        save_file(net.state_dict(), tmp_path / "w.safetensors")
        return str(tmp_path / "w.safetensors"), net

    def test_all_weights_are_loaded(self, name, tmp_path):
        source, old = self.stored(tmp_path, name, spec())
        family, config, net = tiny(name, spec(), weights=source)
        assert any(not torch.equal(v, old.state_dict()[n]) for n, v in net.state_dict().items())
        family.warm_start(config, net)
        assert all(torch.equal(v, old.state_dict()[n]) for n, v in net.state_dict().items())

    def test_a_head_for_other_classes_stays_new(self, name, tmp_path):
        source, old = self.stored(tmp_path, name, spec(classes=10))
        family, config, net = tiny(name, spec(classes=3), weights=source, freeze="backbone")
        before = {n: v.clone() for n, v in net.state_dict().items()}
        family.warm_start(config, net)
        frozen = family.frozen(config, net, 0)
        assert frozen < {n for n, _ in net.named_parameters()}
        for parameter in frozen:
            assert torch.equal(net.state_dict()[parameter], old.state_dict()[parameter])
        new = {n for n, v in old.state_dict().items() if v.shape != before[n].shape}
        assert new
        assert not new & frozen
        assert all(torch.equal(net.state_dict()[n], before[n]) for n in new)

    def test_colour_weights_work_on_grey_images(self, name, tmp_path):
        source, old = self.stored(tmp_path, name, spec(3))
        family, config, net = tiny(name, spec(1), weights=source)
        family.warm_start(config, net)
        grey = torch.randn(2, 1, 32, 32)
        with torch.no_grad():
            expected = old.eval()(grey.expand(-1, 3, -1, -1))
            torch.testing.assert_close(net.eval()(grey), expected, rtol=1e-4, atol=1e-5)

    def test_weights_of_another_network_are_refused(self, name, tmp_path):
        save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
        family, config, net = tiny(name, spec(), weights=str(tmp_path / "w.safetensors"))
        with pytest.raises(TesseraError, match="another network"):
            family.warm_start(config, net)

    def test_freezing_without_weights_is_refused(self, name, tmp_path):
        family, config, net = tiny(name, spec(), freeze="backbone")
        with pytest.raises(UsageError, match="random values"):
            family.warm_start(config, net)


def test_googlenet_loads_weights_with_and_without_auxiliary_heads(tmp_path):
    _, _, old = tiny("googlenet", spec(), seed=7)
    save_file(old.state_dict(), tmp_path / "w.safetensors")
    source = str(tmp_path / "w.safetensors")
    family, config, plain = tiny("googlenet", spec(), weights=source, auxiliary=False)
    family.warm_start(config, plain)
    assert torch.equal(plain.fc.weight, old.fc.weight)
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    family, config, net = tiny("googlenet", spec(), weights=source)
    fresh = net.aux1.fc2.weight.clone()
    family.warm_start(config, net)
    assert torch.equal(net.fc.weight, old.fc.weight)
    assert torch.equal(net.aux1.fc2.weight, fresh)


def test_densenet_loads_files_with_older_names(tmp_path):
    _, _, old = tiny("densenet", spec(), seed=7)
    renamed = {
        n.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v
        for n, v in old.state_dict().items()
    }
    assert renamed.keys() != old.state_dict().keys()
    save_file(renamed, tmp_path / "w.safetensors")
    family, config, net = tiny("densenet", spec(), weights=str(tmp_path / "w.safetensors"))
    family.warm_start(config, net)
    assert all(torch.equal(v, old.state_dict()[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alexnet", {"hidden": 0}), ("alexnet", {"width_divisor": 3}),
        ("alexnet", {"dropout": 1.0}),
        ("vgg", {"depth": 12}), ("vgg", {"hidden": 0}), ("vgg", {"freeze": "gradual"}),
        ("googlenet", {"stem": "huge"}), ("googlenet", {"auxiliary_dropout": -0.1}),
        ("densenet", {"blocks": ()}), ("densenet", {"growth": 0}), ("densenet", {"features": 0}),
        ("vit", {"width": 30}), ("vit", {"heads": 5}), ("vit", {"patch": -1}),
        ("vit", {"drop_path": 1.0}), ("rnn", {"cell": "rnn"}), ("rnn", {"hidden": 0}),
        ("rnn", {"read": "first"}), ("rnn", {"patch": -1}), ("backbone", {"name": "timm/"}),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(name, settings):
    with pytest.raises(UsageError, match="model"):
        type(models.get(name).variants["base"])(**settings)
