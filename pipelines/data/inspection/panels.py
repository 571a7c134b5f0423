"""Turns a sample into a panel, which `visuals.draw` can draw.

In: a decoded image and its annotation. Out: a `Panel` of limited size. Must not know colours, or
where the drawn image goes.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.core.family import Panel
from pipelines.data.annotations import Annotation, Mask, Objects, mask_pixels


def make_panel(image: Image.Image, annotation: Annotation | None, *, max_side: int) -> Panel:
    """Returns the image with its annotation. An image whose longer side has more than `max_side`
    pixels is scaled down to it first, and its boxes and masks with it: a thousand masks of a large
    photo would not fit into memory."""
    factor = min(1.0, max_side / max(image.size))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    small = image.convert("RGB")
    if size != image.size:
        small = small.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    if annotation is None:
        return Panel(pixels)
    if isinstance(annotation, Mask):
        return Panel(pixels, mask=_resize(annotation.pixels, size))
    scale = size[0] / image.width
    return Panel(
        pixels,
        boxes=torch.from_numpy(annotation.boxes * scale),
        labels=torch.from_numpy(annotation.labels),
        crowd=torch.from_numpy(annotation.crowd),
        masks=_masks(annotation, image.size, size) if annotation.masks else None,
    )


def _masks(objects: Objects, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """uint8 (N, H, W) at `size`, decoded one at a time at the size of the image."""
    width, height = image_size
    masks = []
    for number in range(len(objects.masks or ())):
        one = slice(number, number + 1)
        alone = Objects(
            objects.boxes[one],
            objects.labels[one],
            objects.crowd[one],
            (objects.masks or ())[one],
        )
        masks.append(_resize(mask_pixels(alone, height, width)[0], size))
    return torch.stack(masks)


def _resize(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], size: tuple[int, int]
) -> Tensor:
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized))
