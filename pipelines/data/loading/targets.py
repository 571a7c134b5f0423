"""What is said of an image, fitted as the image was: boxes, masks, classes of pixels.

In: annotations in the image's own size. Out: arrays in the size that the network sees. Must not know
where they come from, nor batches beyond their lists.

    N objects of one image, H height, W width; sizes are (height, width)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from models.core.family import Batch
from pipelines.data.annotations import IGNORED, Mask, Objects, mask_pixels, resize
from pipelines.data.images import Fit, crop, extents, view

COUNTS = "objects"
"""How many objects each image has, while they are in one array."""
Array = np.ndarray[Any, Any]
Size = tuple[int, int]


class FittedObjects(NamedTuple):
    """The objects of one image: boxes float32 (N, 4), labels int64 (N,), crowd bool (N,), and masks
    uint8 (N, H, W) where they are asked for."""

    boxes: Array
    labels: Array
    crowd: Array
    masks: Array | None


def fit_objects(objects: Objects, given: Size, to: Size, fit: Fit, *, masks: bool) -> FittedObjects:
    """Scaled or cut; an object of which nothing is left is dropped."""
    pixels = None
    if fit == "crop":
        down, right = view(given, *to, fit).shift
        moved = objects.boxes + np.array([right, down, right, down])
        edges = (to[1], to[0], to[1], to[0])
        boxes = np.clip(moved, 0, edges)
        if masks:
            pixels = _crop_masks(objects, given, to)
    else:
        inner = _inner(given, to, fit)
        resized: Any = resize(objects, given, inner)
        boxes = resized.boxes
        if masks:
            pixels = mask_pixels(resized, *inner)
            if inner != to:
                outside = ((0, 0), (0, to[0] - inner[0]), (0, to[1] - inner[1]))
                pixels = np.pad(pixels, outside)
    boxes = boxes.astype(np.float32)  # in which the sides of a thin one may coincide
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if pixels is not None and objects.masks is not None:
        kept &= pixels.any(axis=(1, 2))
    return FittedObjects(
        boxes[kept],
        objects.labels[kept],
        objects.crowd[kept],
        None if pixels is None else pixels[kept],
    )


def fit_mask(mask: Mask, given: Size, to: Size, fit: Fit) -> Array:
    """uint8 (H, W); what a crop adds is `IGNORED`."""
    if fit == "crop":
        return crop(torch.from_numpy(mask.pixels), *to, outside=IGNORED).numpy()
    inner = _inner(given, to, fit)
    resized: Any = resize(mask, given, inner)
    pixels: Array = resized.pixels
    if inner == to:
        return pixels
    outside = ((0, to[0] - inner[0]), (0, to[1] - inner[1]))
    return np.pad(pixels, outside, constant_values=IGNORED)


def flatten(found: Sequence[FittedObjects]) -> dict[str, Array]:
    """The objects of all images behind each other, and how many each has: a hundred small arrays
    are slow to hand from process to process."""
    names = [name for name, value in zip(FittedObjects._fields, found[0]) if value is not None]
    fields = {name: np.concatenate([getattr(one, name) for one in found]) for name in names}
    return {**fields, COUNTS: np.array([len(one.boxes) for one in found])}


def restore(batch: Batch) -> Batch:
    """A batch of tensors with a list of one an image for each field that `flatten` has made."""
    if COUNTS not in batch:
        return batch
    counts = batch[COUNTS].tolist()
    lists = {
        name: list(batch[name].split(counts)) for name in FittedObjects._fields if name in batch
    }
    return {name: value for name, value in batch.items() if name != COUNTS} | lists


def _inner(given: Size, to: Size, fit: Fit) -> Size:
    """The size that the picture itself has in its frame."""
    height, width = extents(torch.tensor([given]), *to, fit)[0].tolist()
    return height, width


def _crop_masks(objects: Objects, given: Size, to: Size) -> Array:
    """One after the other: all masks of a large photo at once could be gigabytes."""
    pixels = np.zeros((len(objects.boxes), *to), np.uint8)
    for number in range(len(objects.masks or ())):
        one = Objects(
            objects.boxes[number : number + 1],
            objects.labels[number : number + 1],
            objects.crowd[number : number + 1],
            (objects.masks or ())[number : number + 1],
        )
        full = torch.from_numpy(mask_pixels(one, *given))
        pixels[number] = crop(full, *to, outside=0)[0].numpy()
    return pixels
