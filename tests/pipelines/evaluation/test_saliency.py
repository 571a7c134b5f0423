"""Saliency: every family has it, it is high where the class is decided, and networks don't
change."""

from __future__ import annotations

import examples
import pytest
import torch
from torch import Tensor, nn

import models
from pipelines.evaluation.saliency import grad_cam

CLASSIFIERS = [n for n in models.names() if models.get(n).task.name == "classification"]
WITHOUT_MAPS = {"vit", "rnn"}
SPEC = examples.SPECS["classification"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_has_a_saliency_map(name: str) -> None:
    family = models.get(name)
    module, images = examples.tiny(family).train(), examples.train_batch(family)["image"]
    next(module.children()).eval()
    next(module.parameters()).requires_grad_(False)
    modes = [part.training for part in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    result = grad_cam(module, images, torch.arange(8) % 4)
    assert result is not None
    assert result.kind == ("input gradient" if name in WITHOUT_MAPS else "grad-cam")
    assert result.maps.shape == (8, SPEC.height, SPEC.width)
    assert not result.maps.requires_grad
    assert ((result.maps >= 0) & (result.maps <= 1)).all()
    tops = result.maps.amax((1, 2))
    assert (torch.isclose(tops, torch.ones(8)) | (tops == 0)).all()
    assert (tops > 0).any()
    assert modes == [part.training for part in module.modules()]
    assert all(p.grad is None for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()].count(False) == 1
    assert not any(part._forward_hooks for part in module.modules())
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def squares(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise (N, 3, 32, 32), each with two bright squares of 10 pixels: one in the colour of the
    class (N,), one white. Also their positions, bool (N, 32, 32) each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=generator) * 0.3
    labels = torch.arange(count) % 3
    tops = torch.randint(0, 22, (count, 2), generator=generator).tolist()
    lefts = torch.randint(0, 5, (count, 2), generator=generator).tolist()
    places = torch.zeros(2, count, 32, 32, dtype=torch.bool)
    for number, (image, label) in enumerate(zip(images, labels.tolist())):
        for which, (top, left) in enumerate(zip(tops[number], lefts[number])):
            left += 17 * ((number // 3 + which) % 2)
            places[which, number, top : top + 10, left : left + 10] = True
        image[label, places[0, number]] += 2
        image[:, places[1, number]] += 2
    return images, labels, places[0], places[1]


def taught(net: nn.Module) -> nn.Module:
    images, labels, *_ = squares(96, 0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval()


class Patches(nn.Module):
    """A network that ends in a sequence: patches of 4x4, of which the strongest decide."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.dense(self.patches(images).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(tokens.amax(1))
        return logits


def convolutions() -> nn.Module:
    layers = [
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("make", "kind"), [(convolutions, "grad-cam"), (Patches, "input gradient")]
)
def test_saliency_is_high_on_the_square_that_decides(make: type[nn.Module], kind: str) -> None:
    """The coloured square is a tenth of the image. It has much of the heat, and the peak. The
    white square, which carries no information, has less, but not before training."""
    torch.manual_seed(0)
    net = make()
    images, labels, coloured, white = squares(24, 1)

    def share(places: Tensor) -> float:
        """The share of the heat in the squares or within two pixels of them."""
        result = grad_cam(net, images, labels)
        assert result is not None
        assert result.kind == kind
        shares = (result.maps * around(places)).sum((1, 2)) / result.maps.sum((1, 2))
        return float(shares.nan_to_num().mean())

    before = share(coloured) / share(white)
    taught(net)
    assert (net(images).argmax(1) == labels).all()
    assert share(coloured) > 2 * around(coloured).mean()
    assert share(coloured) / share(white) > max(1, 2 * before)
    result = grad_cam(net, images, labels)
    assert result is not None
    peaks = result.maps.flatten(1).argmax(1)
    assert around(coloured).flatten(1).gather(1, peaks[:, None]).mean() > 0.6


def around(positions: Tensor) -> Tensor:
    return nn.functional.max_pool2d(positions[:, None].float(), 5, 1, 2)[:, 0]


def test_each_class_has_its_own_saliency_map() -> None:
    """With two squares in an image, each is highlighted for its own class."""
    torch.manual_seed(0)
    net = taught(convolutions())
    images = torch.zeros(2, 3, 32, 32)
    images[:, 0, 2:12, 2:12] = 2
    images[:, 1, 20:30, 20:30] = 2
    result = grad_cam(net, images, torch.tensor([0, 1]))
    assert result is not None
    first, second = (divmod(int(m.argmax()), 32) for m in result.maps)
    assert max(first) < 16 <= min(second)


def test_feature_maps_of_a_side_branch_are_not_used() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
            self.aside = nn.Conv2d(3, 2, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.main(images)
            self.aside(images)
            return logits

    images, labels, *_ = squares(3, 0)
    result = grad_cam(Aside(), images, labels)
    assert result is not None
    assert result.kind == "input gradient"


def test_feature_maps_with_channels_last_are_not_used() -> None:
    """As in torchvision's Swin transformers: the permuted maps are used."""

    class Last(nn.Module):
        def __init__(self, *, ordered: bool) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 12, 8, 8)
            self.norm = nn.LayerNorm(12)
            self.order = nn.Identity() if ordered else None
            self.head = nn.Linear(12, 3)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.norm(self.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps = maps if self.order is None else self.order(maps)
            logits: Tensor = self.head(maps.mean((2, 3)))
            return logits

    images, labels, *_ = squares(3, 0)
    for ordered, kind in ((True, "grad-cam"), (False, "input gradient")):
        result = grad_cam(Last(ordered=ordered), images, labels)
        assert result is not None
        assert result.kind == kind


def test_a_network_without_logits_has_no_saliency_map() -> None:
    images, labels, *_ = squares(3, 0)
    assert grad_cam(nn.Conv2d(3, 3, 3), images, labels) is None
    assert grad_cam(nn.Flatten(), images, labels) is not None
