"""The networks of the papers, on their image sizes and on smaller ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from models.cnn import CnnConfig
from models.core.errors import UsageError
from models.core.family import DataSpec
from pipelines import recipe as recipes

CNN = models.get("cnn")


def spec(channels: int, size: int, classes: int = 10) -> DataSpec:
    names = tuple(str(k) for k in range(classes))
    return DataSpec("classification", channels, size, size, names)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


ARTICLES = {
    "lenet-dropout": (
        spec(1, 28),
        nn.Sequential(
            nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(10, 20, 5), nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(320, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 10),
        ),
    ),
    "two-conv": (
        spec(3, 32),
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10),
        ),
    ),
    "keras-style": (
        spec(3, 32),
        nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
        ),
    ),
    "four-conv": (
        spec(3, 32),
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128 * 2 * 2, 512), nn.ReLU(), nn.Linear(512, 10),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARTICLES)
def test_has_the_layers_of_the_paper(name):
    """Compared with the printed layers (flatten corrected), with the same weights in order."""
    data, printed = ARTICLES[name]
    ours = CNN.build(CNN.variants[name], data)
    assert count(ours) == count(printed)
    own, theirs = list(ours.state_dict()), list(printed.state_dict())
    printed.load_state_dict({t: ours.state_dict()[o] for o, t in zip(own, theirs)})
    images = torch.randn(4, *data.shape)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), printed.eval()(images))
        torch.manual_seed(0)
        first = ours.train()(images)
        torch.manual_seed(0)
        assert torch.equal(first, ours(images))
        assert (not torch.equal(first, ours(images))) == ("dropout" in name)


@pytest.mark.parametrize("variant", sorted(CNN.variants))
@pytest.mark.parametrize("size", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_works_on_any_image_size(variant, size, channels):
    data = spec(channels, size, classes=3)
    module = CNN.build(CNN.variants[variant], data)
    loss = CNN.loss(
        module, {"image": torch.randn(3, *data.shape), "label": torch.tensor([0, 1, 2])}
    )
    loss["loss"].backward()
    assert torch.isfinite(loss["loss"])


def test_works_on_images_that_are_not_square():
    data = DataSpec("classification", 3, 40, 9, ("a", "b"))
    for config in CNN.variants.values():
        assert CNN.build(config, data).eval()(torch.randn(2, *data.shape)).shape == (2, 2)


def test_tiny_does_not_depend_on_the_split_of_a_batch():
    """Tests that compare numbers of workers rely on it."""
    module = CNN.build(CNN.variants["tiny"], spec(1, 8))
    assert not list(module.buffers())
    assert not any(m.p for m in module.modules() if isinstance(m, nn.Dropout | nn.Dropout2d))


def test_variants_have_the_optimizers_of_their_papers():
    lenet = recipes.start("cnn", "lenet-dropout")
    assert (lenet.optim["model"].kind, lenet.optim["model"].momentum) == ("sgd", 0.5)
    assert recipes.start("cnn", "keras-style").optim["model"].kind == "adam"
    four = recipes.start("cnn", "four-conv")
    assert (four.optim["model"].lr, four.optim["model"].momentum) == (0.01, 0.9)
    assert four.schedule.kind == "constant"


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": ()},
        {"channels": (0,)},
        {"convs": 0},
        {"kernel": 2},
        {"dropout": 1.0},
        {"pools": -1},
    ],
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(UsageError, match="model"):
        CnnConfig(**settings)
    (path, value), *_ = settings.items()
    with pytest.raises(UsageError, match="model"):
        recipes.start("cnn").with_overrides({f"model.{path}": value})


def test_mirror_averages_the_image_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    plain = CNN.build(CnnConfig(channels=(4,)), spec(1, 8)).eval()
    mirrored = CNN.build(CnnConfig(channels=(4,), mirror=True), spec(1, 8)).eval()
    mirrored.load_state_dict(plain.state_dict())
    image = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        both = (plain(image) + plain(image.flip(-1))) / 2
        assert not torch.allclose(plain(image), both)
        torch.testing.assert_close(mirrored(image), both)
        torch.testing.assert_close(mirrored(image.flip(-1)), mirrored(image))
        torch.testing.assert_close(mirrored.train()(image), plain.train()(image))
