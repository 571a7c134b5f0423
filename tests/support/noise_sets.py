"""Images of noise with annotations of every kind of data.

In: a kind of data and a number. Out: noise with that seed, and its annotation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.data import rle
from pipelines.data.annotations import Mask, Objects

SIDE = 16
CLASSES = ("ant", "bee", "cat")
KINDS = (
    "classification",
    "detection",
    "instance_segmentation",
    "semantic_segmentation",
    "images",
)


def pixels(number: int, *, channels: int = 3) -> np.ndarray[Any, Any]:
    shape = (SIDE, SIDE, channels) if channels > 1 else (SIDE, SIDE)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def objects(number: int, *, masks: bool) -> Objects:
    boxes = np.array([[1, 2, 9 + number, 12], [3, 3, 9, 10]], np.float64)
    drawn = np.zeros((2, SIDE, SIDE), np.uint8)
    for mask, (left, top, right, bottom) in zip(drawn, boxes.astype(int).tolist()):
        mask[top:bottom, left:right] = 1
    texts = tuple(rle.write(rle.of_mask(mask)) for mask in drawn) if masks else None
    return Objects(boxes, np.array([number % 3, 2]), np.zeros(2, bool), texts)


def annotation(kind: str, number: int) -> Any:
    """The annotation of an image: a class, objects, a mask, or None, by kind."""
    if kind == "classification":
        return number % 3
    if kind == "images":
        return None
    if kind == "semantic_segmentation":
        return Mask(pixels(number, channels=1) % 3)
    return objects(number, masks=kind == "instance_segmentation")
