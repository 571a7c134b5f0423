"""Saliency: every family has it, it points at what was learned, and the network doesn't notice."""

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
def test_every_classifier_has_it(name: str) -> None:
    family = models.get(name)
    module, images = examples.tiny(family).train(), examples.train_batch(family)["image"]
    next(module.children()).eval()
    next(module.parameters()).requires_grad_(False)
    modes = [part.training for part in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    found = grad_cam(module, images, torch.arange(8) % 4)
    assert found is not None
    assert found.kind == ("input gradient" if name in WITHOUT_MAPS else "grad-cam")
    assert found.maps.shape == (8, SPEC.height, SPEC.width)
    assert not found.maps.requires_grad
    assert ((found.maps >= 0) & (found.maps <= 1)).all()
    tops = found.maps.amax((1, 2))
    assert (torch.isclose(tops, torch.ones(8)) | (tops == 0)).all()
    assert (tops > 0).any()
    assert modes == [part.training for part in module.modules()]
    assert all(p.grad is None for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()].count(False) == 1
    assert not any(part._forward_hooks for part in module.modules())
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def squares(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise (N, 3, 32, 32); each with two bright squares of 10 pixels: the colour of one is
    its class (N,), the other is white; where they are, bool (N, 32, 32) each."""
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
    """A network that ends in a sequence: patches of 4x4, of which the strongest count."""

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
def test_it_points_at_what_decides(make: type[nn.Module], kind: str) -> None:
    """A tenth of the image is the coloured square: there lie much of the heat, and its peak. The
    white one, which says nothing, is colder, and was not before the network learned that."""
    torch.manual_seed(0)
    net = make()
    images, labels, coloured, white = squares(24, 1)

    def share(places: Tensor) -> float:
        """Of the heat, what lies in the squares or two pixels from them."""
        found = grad_cam(net, images, labels)
        assert found is not None
        assert found.kind == kind
        shares = (found.maps * around(places)).sum((1, 2)) / found.maps.sum((1, 2))
        return float(shares.nan_to_num().mean())

    before = share(coloured) / share(white)
    taught(net)
    assert (net(images).argmax(1) == labels).all()
    assert share(coloured) > 2 * around(coloured).mean()
    assert share(coloured) / share(white) > max(1, 2 * before)
    found = grad_cam(net, images, labels)
    assert found is not None
    peaks = found.maps.flatten(1).argmax(1)
    assert around(coloured).flatten(1).gather(1, peaks[:, None]).mean() > 0.6


def around(places: Tensor) -> Tensor:
    return nn.functional.max_pool2d(places[:, None].float(), 5, 1, 2)[:, 0]


def test_another_class_has_another_map() -> None:
    """Two squares in an image: each is seen when its class is asked for."""
    torch.manual_seed(0)
    net = taught(convolutions())
    images = torch.zeros(2, 3, 32, 32)
    images[:, 0, 2:12, 2:12] = 2
    images[:, 1, 20:30, 20:30] = 2
    found = grad_cam(net, images, torch.tensor([0, 1]))
    assert found is not None
    first, second = (divmod(int(m.argmax()), 32) for m in found.maps)
    assert max(first) < 16 <= min(second)


def test_maps_of_a_side_branch_are_not_the_networks() -> None:
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
    found = grad_cam(Aside(), images, labels)
    assert found is not None
    assert found.kind == "input gradient"


def test_channels_that_come_last_are_no_map() -> None:
    """As in Swin transformers of torchvision: their last maps are those that are put in order."""

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
        found = grad_cam(Last(ordered=ordered), images, labels)
        assert found is not None
        assert found.kind == kind


def test_a_network_without_logits_has_none() -> None:
    images, labels, *_ = squares(3, 0)
    assert grad_cam(nn.Conv2d(3, 3, 3), images, labels) is None
    assert grad_cam(nn.Flatten(), images, labels) is not None
