"""Objects are painted into the images; after each transform they must be inside their boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.core.errors import UsageError
from models.core.family import Batch, BatchRng, DataSpec
from models.transforms.object_augment import ObjectAugment, ObjectAugmentSettings

HEIGHT, WIDTH, COUNT = 80, 100, 12
DATA = DataSpec("detection", 3, HEIGHT, WIDTH, ("a", "b"), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
OBJECTS = ((10, 8, 30, 20), (40, 30, 56, 60), (3, 50, 25, 64))


def batch(extent: tuple[int, int] = (HEIGHT, WIDTH)) -> Batch:
    """Black images with bright objects; the brightness is the number of the image."""
    images = torch.zeros(COUNT, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    for number, image in enumerate(images):
        for left, top, right, bottom in OBJECTS:
            image[:, top:bottom, left:right] = 255 - 4 * number
    boxes = torch.tensor(OBJECTS, dtype=torch.float32)
    return {
        "image": images,
        "key": [str(n) for n in range(COUNT)],
        "extent": torch.tensor([extent] * COUNT),
        "boxes": [boxes.clone() for _ in range(COUNT)],
        "labels": [torch.tensor([0, 1, 0]) for _ in range(COUNT)],
        "crowd": [torch.tensor([False, False, True]) for _ in range(COUNT)],
    }


def augmented(original: Batch, seed: int = 0, **settings: object) -> Batch:
    transform = ObjectAugment(ObjectAugmentSettings(**settings), DATA)
    return transform(original, BatchRng(seed, COUNT, slice(0, COUNT)))


def fits(image: Tensor, boxes: Tensor) -> bool:
    """Bright inside of the boxes, dark outside, except for one pixel at their edges."""
    bright, dark = image[0] > 0.3, image[0] < 0.6
    outer, inner = torch.zeros_like(bright), torch.zeros_like(bright)
    for left, top, right, bottom in boxes.round().int().tolist():
        outer[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
        inner[top + 1 : max(bottom - 1, 0), left + 1 : max(right - 1, 0)] = True
    return bool((dark | outer).all()) and bool((inner <= bright).all())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flip": True},
        {"flip_vertical": True},
        {"zoom": 0.5},
        {"shift": 0.2},
        {"mosaic": 1.0},
        {"mosaic": 0.5, "zoom": 0.5, "shift": 0.2, "flip": True, "flip_vertical": True},
        {"brightness": 0.2, "contrast": 0.2, "colour": 0.1},
    ],
)
@pytest.mark.parametrize("extent", [(HEIGHT, WIDTH), (66, 60)])
def test_boxes_stay_on_their_objects(settings, extent, monkeypatch):
    # pieces of dropped objects would be bright pixels without a box
    monkeypatch.setattr("models.transforms.object_augment.LEAST_SHARE", 0.0)
    original = batch(extent)
    for seed in range(3):
        seen = augmented(original, seed, **settings)
        assert seen["image"].shape == (COUNT, 3, HEIGHT, WIDTH)
        assert seen["image"].dtype == torch.float32
        for image, boxes, labels, crowd in zip(
            *(seen[name] for name in ("image", "boxes", "labels", "crowd"))
        ):
            assert fits(image, boxes)
            assert len(boxes) == len(labels) == len(crowd)
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).all()
    assert torch.equal(original["boxes"][0], batch()["boxes"][0]), (
        "the loader's batch stays as it was"
    )
    assert original["image"].dtype == torch.uint8


def test_control_unchanged_boxes_miss_mirrored_objects():
    seen = augmented(batch(), flip=True)
    moved = [not fits(image, batch()["boxes"][0]) for image in seen["image"]]
    assert any(moved)
    assert not all(moved)


def test_mirroring_stays_inside_the_extent():
    extent = (66, 60)
    seen = augmented(batch(extent), flip=True)
    assert torch.equal(seen["extent"], batch(extent)["extent"])
    assert not seen["image"][..., extent[1] :].any()
    mirrored = [b for b in seen["boxes"] if not torch.equal(b, batch()["boxes"][0])]
    assert mirrored[0][0].tolist() == [30.0, 8.0, 50.0, 20.0]  # 60 - 30, 60 - 10
    assert augmented(batch(extent), zoom=0.5)["extent"].tolist() == [[HEIGHT, WIDTH]] * COUNT


def test_a_mosaic_contains_several_images():
    seen = augmented(batch(), mosaic=1.0)
    shades = [len(image[0][image[0] > 0.5].round(decimals=3).unique()) for image in seen["image"]]
    assert max(shades) > 3  # several brightnesses: of several images
    assert max(len(boxes) for boxes in seen["boxes"]) > len(OBJECTS)


def test_augmentation_does_not_depend_on_the_ranks():
    settings = {"flip": True, "zoom": 0.5, "shift": 0.2, "brightness": 0.2, "contrast": 0.2}
    whole = augmented(batch(), 7, **settings)
    half = {name: value[6:] for name, value in batch().items()}
    transform = ObjectAugment(ObjectAugmentSettings(**settings), DATA)
    part = transform(half, BatchRng(7, COUNT, slice(6, COUNT)))
    torch.testing.assert_close(part["image"], whole["image"][6:])
    for one, other in zip(part["boxes"], whole["boxes"][6:]):
        assert torch.equal(one, other)


def test_mosaics_of_images_without_objects_and_of_a_single_image():
    original = batch()
    for name in ("boxes", "labels", "crowd"):
        original[name] = [value[:0] for value in original[name]]
    seen = augmented(original, mosaic=1.0, zoom=0.3)
    assert [tuple(boxes.shape) for boxes in seen["boxes"]] == [(0, 4)] * COUNT
    one = {name: value[:1] for name, value in batch().items()}
    transform = ObjectAugment(ObjectAugmentSettings(mosaic=1.0), DATA)
    assert fits(*(transform(one, BatchRng(0, 1, slice(0, 1)))[n][0] for n in ("image", "boxes")))


def test_pixels_are_normalised():
    data = DataSpec("detection", 3, HEIGHT, WIDTH, ("a",), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    original = batch()
    seen = ObjectAugment(ObjectAugmentSettings(), data)(
        original, BatchRng(0, COUNT, slice(0, COUNT))
    )
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    torch.testing.assert_close(seen["image"], (original["image"].float() / 255 - mean) / std)
    assert original["image"].dtype == torch.uint8


@pytest.mark.parametrize(
    "settings", [{"zoom": -1.0}, {"shift": 1.0}, {"mosaic": 1.5}, {"contrast": -0.1}]
)
def test_invalid_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(UsageError, match=f"augment.{name}"):
        ObjectAugmentSettings(**settings)
