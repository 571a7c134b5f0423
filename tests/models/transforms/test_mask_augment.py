"""Masks and boxes stay on their objects through every augmentation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.core.family import BatchRng, DataSpec
from models.transforms.mask_augment import MaskAugment, MaskAugmentSettings, boxes_of


def painted(count=6, extent=(64, 64), seed=0):
    """Images in which each object is a bright patch with its own shape."""
    generator = torch.Generator().manual_seed(seed)
    data = DataSpec("instance_segmentation", 3, 64, 64, ("a", "b"))
    images = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    batch = {"key": [str(i) for i in range(count)], "index": torch.arange(count)}
    fields = {"boxes": [], "labels": [], "crowd": [], "masks": []}
    for image in images:
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        for pixels, left in zip(masks, (3, 22)):
            top = int(torch.randint(3, extent[0] - 20, (1,), generator=generator))
            pixels[top : top + 12, left : left + 9] = 1
            pixels[top : top + 4, left : left + 14] = 1
        image[:] = masks.amax(0) * 255
        fields["masks"].append(masks)
        fields["boxes"].append(boxes_of(masks))
        fields["labels"].append(torch.tensor([0, 1]))
        fields["crowd"].append(torch.tensor([False, True]))
    sizes = torch.tensor([list(extent)] * count)
    return data, batch | fields | {"image": images, "size": sizes, "extent": sizes.clone()}


def augmented(settings, batch, data, *, total=None, rows=None):
    count = len(batch["key"])
    rng = BatchRng(7, total or count, rows or slice(0, count))
    plain = dataclasses.replace(data, mean=(0.0,) * 3, std=(1.0,) * 3)
    return MaskAugment(MaskAugmentSettings(**settings), plain)(batch, rng)


WAYS = {
    "flip": {"flip": True},
    "flip_vertical": {"flip_vertical": True},
    "rotate": {"rotate": True},
    "zoom": {"zoom": 0.6},
    "shift": {"shift": 0.3},
    "mosaic": {"mosaic": 0.7, "zoom": 0.3},
    "all": {"flip": True, "flip_vertical": True, "rotate": True, "zoom": 0.5, "shift": 0.2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("extent", [(64, 64), (48, 40)])
def test_masks_follow_the_image(way, extent):
    data, batch = painted(extent=extent)
    seen = augmented(WAYS[way], batch, data)
    assert not torch.equal(seen["image"], batch["image"] / 255), "nothing was done"
    pixels = bright = 0
    for image, masks, boxes in zip(seen["image"], seen["masks"], seen["boxes"]):
        assert torch.equal(boxes, boxes_of(masks))
        assert masks.dtype == torch.uint8
        union = masks.amax(0).bool() if len(masks) else torch.zeros(64, 64, dtype=torch.bool)
        pixels += int((union & (image[0] > 0.5)).sum())
        bright += int((union | (image[0] > 0.5)).sum())
    # bilinear pixels are half bright at an edge; dropped objects are still to be seen
    assert pixels / bright > (0.85 if way in ("zoom", "shift", "mosaic", "all") else 0.999)


def test_rotation_stays_inside_the_extent():
    data, batch = painted(extent=(40, 40))
    seen = augmented({"rotate": True}, batch, data)
    assert not seen["image"][:, :, 40:].any()
    assert not seen["image"][:, :, :, 40:].any()
    assert torch.equal(seen["extent"], batch["extent"])
    before = [int(m.sum()) for m in batch["masks"]]
    assert [int(m.sum()) for m in seen["masks"]] == before
    turned = [not torch.equal(a, b) for a, b in zip(seen["masks"], batch["masks"])]
    assert any(turned)
    assert not all(turned)


def test_objects_that_leave_the_image_are_dropped():
    data, batch = painted(count=40)
    seen = augmented({"shift": 0.9}, batch, data)
    counts = [len(masks) for masks in seen["masks"]]
    assert min(counts) < 2
    for name in ("boxes", "labels", "crowd"):
        assert [len(value) for value in seen[name]] == counts
    assert all(m.any(2).any(1).all() for m in seen["masks"])
    crowds = torch.cat(seen["crowd"])
    assert torch.equal(torch.cat(seen["labels"]) == 1, crowds)


def test_augmentation_does_not_depend_on_the_ranks():
    data, batch = painted()
    settings = WAYS["all"] | {"brightness": 0.2, "contrast": 0.3, "colour": 0.1}
    whole = augmented(settings, batch, data)
    half = {name: value[3:] for name, value in batch.items()}
    mine = augmented(settings, half, data, total=6, rows=slice(3, 6))
    for name in ("image", "extent"):
        torch.testing.assert_close(mine[name], whole[name][3:])
    for name in ("boxes", "masks", "labels"):
        assert all(torch.equal(a, b) for a, b in zip(mine[name], whole[name][3:]))


def test_the_loaders_batch_is_not_changed():
    data, batch = painted()
    kept = [m.clone() for m in batch["masks"]]
    images = batch["image"].clone()
    augmented(WAYS["all"], batch, data)
    assert torch.equal(batch["image"], images)
    assert all(torch.equal(a, b) for a, b in zip(batch["masks"], kept))


def test_images_without_objects_work():
    data, batch = painted()
    empty = {
        name: [v[:0] for v in value] if name in ("boxes", "labels", "crowd", "masks") else value
        for name, value in batch.items()
    }
    for settings in WAYS.values():
        seen = augmented(settings, empty, data)
        assert all(m.shape == (0, 64, 64) for m in seen["masks"])
        assert all(b.shape == (0, 4) for b in seen["boxes"])
