"""Random crops of training images, cut before an image is resized.

In: what is drawn (`RandomCrop`), seed and epoch; then a sample's number and the size of its image.
Out: a box, and the pixels in it at the size that the network sees. Must not know files, batches or
ranks.

A box is a function of seed, epoch and sample number. The random numbers are the raw stream of
Philox, which NumPy guarantees: each sample has a part of the stream of its own, so any draw costs
the same, and ranks, loader processes, order and resumes can't change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from models.core.family import RandomCrop
from pipelines.data.images import Size, resize
from pipelines.data.jpeg import SHRINKS

TRIES = 10
"""As in torchvision: if none of so many boxes lies inside of the image, its middle is taken."""
SHRUNK_MARGIN = 1.5
"""A view has at most 1/1.5 of the rows and columns that it is made of in an image that was shrunk
while it was decoded. On 592 photos of 348 by 348 pixels such views differ from those of the whole
image by 0.7 (1/2) to 1.4 (1/8) of 255 on the mean, by 2.3 for the worst photo. Without a margin it
is 1.9 to 3.1, and up to 5.3."""
_SHRUNK_SIDE = 16
"""Boxes with a shorter side are never cut from an image that was shrunk while it was decoded."""
_TO_UNIT = 2.0**-53


class Box(NamedTuple):
    """A rectangle in pixels of an upright image."""

    top: int
    left: int
    height: int
    width: int


Cut = Callable[[int, Size], Box]
"""From a sample's number and the size of its image, (height, width), to the box of its view."""


def choose_box(crop: RandomCrop, size: Size, drawn: np.ndarray[Any, Any]) -> Box:
    """The box that torchvision's `RandomResizedCrop` chooses in an image of `size` (height, width)
    if it draws these numbers: float64 (TRIES, 4) in [0, 1), for area, ratio, top and left."""
    height, width = size
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for area, ratio, top, left in drawn.tolist():
        target = height * width * (crop.scale[0] + area * (crop.scale[1] - crop.scale[0]))
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    h, w = height, width
    if width / height < crop.ratio[0]:
        h = max(round(width / crop.ratio[0]), 1)
    elif width / height > crop.ratio[1]:
        w = max(round(height * crop.ratio[1]), 1)
    return Box((height - h) // 2, (width - w) // 2, h, w)


class EpochCrops:
    """The boxes of one epoch, a `Cut`. Not thread-safe."""

    def __init__(self, crop: RandomCrop, seed: int, epoch: int) -> None:
        self._crop = crop
        key = hashlib.sha256(f"crops\0{seed}\0{epoch}".encode()).digest()[:16]
        self._random = np.random.Philox(key=int.from_bytes(key, "little"))
        self._state: Any = self._random.state

    def __call__(self, sample: int, size: Size) -> Box:
        return choose_box(self._crop, size, self.draw(sample))

    def draw(self, sample: int) -> np.ndarray[Any, Any]:
        """The random numbers of a sample: float64 (TRIES, 4) in [0, 1)."""
        # A new generator for each sample would take seven times as long.
        self._state["state"]["counter"][:] = 0, sample, 0, 0
        self._random.state = self._state
        raw = self._random.random_raw(TRIES * 4).reshape(TRIES, 4)
        drawn: np.ndarray[Any, Any] = (raw >> np.uint64(11)) * _TO_UNIT
        return drawn


class RunCrops:
    """The `Cut` of each batch of a training, for its key (epoch, start)."""

    def __init__(self, crop: RandomCrop, seed: int) -> None:
        self._crop, self._seed = crop, seed
        self._current: tuple[int, EpochCrops] | None = None

    def __call__(self, key: tuple[int, int]) -> Cut:
        epoch = key[0]
        if self._current is None or self._current[0] != epoch:
            self._current = epoch, EpochCrops(self._crop, self._seed, epoch)
        return self._current[1]


class View(NamedTuple):
    """What a view of a training image shows: the part in `box`, of an image that may be shrunk to
    1/`shrink` while it is decoded."""

    box: Box
    shrink: int


def view_of(box: Box, size: Size, height: int, width: int) -> View:
    """The view of `height` by `width` pixels that shows `box` of an image of `size`.

    The image is shrunk by 1 or one of `jpeg.SHRINKS`, so that the box still has `SHRUNK_MARGIN`
    times `height` by `width` pixels. The edges of the box are moved outwards to whole pixels of the
    shrunk image, by less than a pixel of the view. They are so for every format, also for one that
    is decoded at full size.
    """
    shrink = 1
    if min(box.height, box.width) >= _SHRUNK_SIDE:
        most = min(box.height / height, box.width / width) / SHRUNK_MARGIN
        shrink = next((k for k in SHRINKS if k <= most), 1)
    top, left = box.top // shrink * shrink, box.left // shrink * shrink
    bottom = min(-(-(box.top + box.height) // shrink) * shrink, size[0])
    right = min(-(-(box.left + box.width) // shrink) * shrink, size[1])
    return View(Box(top, left, bottom - top, right - left), shrink)


def cut_out(
    image: Tensor, box: Box, height: int, width: int, scale: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The pixels in `box`, resized: uint8 (C, h, w) -> uint8 (C, height, width).

    The box is one of an image that had another size: its coordinates times `scale`, for rows and
    columns, are rounded to pixels of `image`.
    """
    high, wide = scale
    top, left = int(box.top * high + 0.5), int(box.left * wide + 0.5)
    bottom = max(int((box.top + box.height) * high + 0.5), top + 1)
    right = max(int((box.left + box.width) * wide + 0.5), left + 1)
    return resize(image[:, top:bottom, left:right], height, width)
