"""Changes of light and colour beside torchvision's, image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.core.errors import UsageError
from models.core.family import BatchRng, DataSpec
from models.tasks.classification import CLASSIFICATION, ClassificationAugment
from models.transforms import colour
from models.transforms.colour import ColourSettings, change_colours, erase

ALL = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "greyscale": 0.3}


def images(count: int = 6, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, channels, 9, 7, generator=generator)
    pixels[0] = pixels[0, :1]  # a grey image has no hue
    pixels[1, :, 2:5] = 0.0
    pixels[2, :, :, 3] = 1.0
    return pixels


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_change_is_torchvisions(name: str) -> None:
    from torchvision.transforms.v2 import functional

    amounts = [-0.5, -0.2, 0.0, 0.1, 0.4, 0.5] if name == "hue" else [0.0, 0.3, 1.0, 1.2, 1.9, 0.7]
    given = torch.tensor(amounts)[:, None, None, None]
    got = getattr(colour, f"adjust_{name}")(images(), given)
    for image, amount, result in zip(images(), amounts, got):
        expected = getattr(functional, f"adjust_{name}")(image, amount)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_ranks_see_the_same_images(channels: int) -> None:
    settings = ColourSettings(**ALL, erasing=0.5)

    def change(rows: slice) -> Tensor:
        rng = BatchRng(5, 6, rows)
        return erase(change_colours(images(6, channels)[rows], settings, rng), 0.5, rng)

    whole = change(slice(0, 6))
    parts = torch.cat([change(slice(0, 2)), change(slice(2, 6))])
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(whole, images(6, channels))


@pytest.mark.parametrize("name", list(ALL))
def test_what_is_off_draws_nothing(name: str) -> None:
    """So a setting that is added later changes no training without it."""
    first, second = BatchRng(5, 6, slice(0, 6)), BatchRng(5, 6, slice(0, 6))
    change_colours(images(), ColourSettings(), first)
    assert torch.equal(first.uniform(1), second.uniform(1))
    change_colours(images(), ColourSettings(**{name: ALL[name]}), first)
    second.uniform(1)
    assert torch.equal(first.uniform(1), second.uniform(1))


def test_a_rectangle_is_blanked_in_a_share_of_the_images() -> None:
    ones = torch.ones(2000, 3, 40, 30)
    erased = erase(ones, 0.25, BatchRng(0, 2000, slice(0, 2000))) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    counts = erased[:, 0].sum((1, 2))
    assert 0.2 < float((counts > 0).float().mean()) < 0.3
    for number in torch.nonzero(counts)[:20, 0].tolist():
        rows, columns = erased[number, 0].any(1), erased[number, 0].any(0)
        assert counts[number] == rows.sum() * columns.sum(), "a rectangle"
        assert 0.015 < counts[number] / 1200 < 0.36
    assert not (erase(ones, 0.0, BatchRng(0, 2000, slice(0, 2000))) == 0).any()


def test_a_classifier_sees_the_changes() -> None:
    data = DataSpec("classification", 3, 9, 7, ("a", "b"), (0.5,) * 3, (0.25,) * 3)
    batch = {"image": (images() * 255).round().byte(), "label": torch.zeros(6, dtype=torch.int64)}
    plain = CLASSIFICATION.augment(ClassificationAugment(), data, train=True)
    changed = CLASSIFICATION.augment(ClassificationAugment(**ALL), data, train=True)
    seen = [t(dict(batch), BatchRng(3, 6, slice(0, 6)))["image"] for t in (plain, changed)]
    expected = change_colours(
        batch["image"] / 255, ColourSettings(**ALL), BatchRng(3, 6, slice(0, 6))
    )
    torch.testing.assert_close(seen[0], (batch["image"] / 255 - 0.5) / 0.25)
    torch.testing.assert_close(seen[1], (expected - 0.5) / 0.25, atol=1e-5, rtol=1e-5)
    evaluated = CLASSIFICATION.augment(ClassificationAugment(**ALL), data, train=False)
    assert torch.equal(evaluated(dict(batch), BatchRng(3, 6, slice(0, 6)))["image"], seen[0])


@pytest.mark.parametrize(
    "settings", [{"brightness": 1.5}, {"hue": 0.6}, {"erasing": -0.1}, {"greyscale": 2}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"augment.{next(iter(settings))}"):
        ClassificationAugment(**settings)
