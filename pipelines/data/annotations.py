"""What is said of an image: objects with boxes and masks, or the class of each pixel.

In: what an importer read, or bytes from a shard. Out: checked annotations, and the one form in which
each lies in a shard. Must not know formats of sources, shards or cards.

    N objects, H height, W width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORED = 255
"""The value of a mask's pixels that have no class and are not counted."""


@dataclass(frozen=True)
class Objects:
    """The objects of one image; there may be none.

    boxes   float64 (N, 4): left, top, right, bottom in pixels, from the image's left upper corner
    labels  int64 (N,) class indices
    crowd   bool (N,): regions of many objects, which are not trained on
    masks   for each object its pixels as COCO's compressed run lengths (columns first), ASCII; None
            where the source has boxes only
    """

    boxes: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    crowd: np.ndarray[Any, Any]
    masks: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class Mask:
    """The class of each pixel: uint8 (H, W), `IGNORED` where there is none."""

    pixels: np.ndarray[Any, Any]


Annotation = Objects | Mask
