"""Fits annotations as the image was fitted: boxes, masks, classes of pixels.

In: annotations in the image's own size. Out: arrays in the size that the network sees. Must not
know where they come from, nor batches beyond their lists.

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
"""The field of a flattened batch with the number of objects of each image."""
Array = np.ndarray[Any, Any]
Size = tuple[int, int]


class FittedObjects(NamedTuple):
    """The objects of one image: boxes float32 (N, 4), labels int64 (N,), crowd bool (N,), and masks
    uint8 (N, H, W) or None."""

    boxes: Array
    labels: Array
    crowd: Array
    masks: Array | None


def fit_objects(objects: Objects, size: Size, to: Size, fit: Fit, *, masks: bool) -> FittedObjects:
    """Scales or crops objects from an image of size `size` to `to`. An object is dropped if nothing
    of it is left. Masks are rendered only with `masks`."""
    pixels = None
    if fit == "crop":
        down, right = view(size, *to, fit).shift
        moved = objects.boxes + np.array([right, down, right, down])
        edges = (to[1], to[0], to[1], to[0])
        boxes = np.clip(moved, 0, edges)
        if masks:
            pixels = _crop_masks(objects, size, to)
    else:
        inner = _inner(size, to, fit)
        resized: Any = resize(objects, size, inner)
        boxes = resized.boxes
        if masks:
            pixels = mask_pixels(resized, *inner)
            if inner != to:
                outside = ((0, 0), (0, to[0] - inner[0]), (0, to[1] - inner[1]))
                pixels = np.pad(pixels, outside)
    boxes = boxes.astype(np.float32)  # in float32 the sides of a thin box may coincide
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if pixels is not None and objects.masks is not None:
        kept &= pixels.any(axis=(1, 2))
    return FittedObjects(
        boxes[kept],
        objects.labels[kept],
        objects.crowd[kept],
        None if pixels is None else pixels[kept],
    )


def fit_mask(mask: Mask, size: Size, to: Size, fit: Fit) -> Array:
    """Scales or crops a mask from `size` to `to`: uint8 (H, W). Added pixels are `IGNORED`."""
    if fit == "crop":
        return crop(torch.from_numpy(mask.pixels), *to, outside=IGNORED).numpy()
    inner = _inner(size, to, fit)
    resized: Any = resize(mask, size, inner)
    pixels: Array = resized.pixels
    if inner == to:
        return pixels
    outside = ((0, to[0] - inner[0]), (0, to[1] - inner[1]))
    return np.pad(pixels, outside, constant_values=IGNORED)


def flatten(images: Sequence[FittedObjects]) -> dict[str, Array]:
    """Concatenates the objects of all images, and counts those of each: passing a hundred small
    arrays between processes is slow."""
    names = [name for name, value in zip(FittedObjects._fields, images[0]) if value is not None]
    fields = {name: np.concatenate([getattr(one, name) for one in images]) for name in names}
    return {**fields, COUNTS: np.array([len(one.boxes) for one in images])}


def unflatten(batch: Batch) -> Batch:
    """Splits each field that `flatten` has made into a list with one tensor an image."""
    if COUNTS not in batch:
        return batch
    counts = batch[COUNTS].tolist()
    lists = {
        name: list(batch[name].split(counts)) for name in FittedObjects._fields if name in batch
    }
    return {name: value for name, value in batch.items() if name != COUNTS} | lists


def _inner(size: Size, to: Size, fit: Fit) -> Size:
    """The size of the image inside its frame."""
    height, width = extents(torch.tensor([size]), *to, fit)[0].tolist()
    return height, width


def _crop_masks(objects: Objects, size: Size, to: Size) -> Array:
    """Renders one mask at a time: all masks of a large photo at once could take gigabytes."""
    pixels = np.zeros((len(objects.boxes), *to), np.uint8)
    for number in range(len(objects.masks or ())):
        one = Objects(
            objects.boxes[number : number + 1],
            objects.labels[number : number + 1],
            objects.crowd[number : number + 1],
            (objects.masks or ())[number : number + 1],
        )
        full = torch.from_numpy(mask_pixels(one, *size))
        pixels[number] = crop(full, *to, outside=0)[0].numpy()
    return pixels
