"""Masks in COCO files: polygons, run lengths as numbers, run lengths as text.

In: the `segmentation` of an annotation, or corners of polygons. Out: run lengths. Must not know
files. pycocotools, which draws the polygons, trusts its input, so every number is checked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data import rle
from pipelines.data.annotations import ROUNDING
from pipelines.data.safe_parsers import is_number
from pipelines.data.sample_error import SampleError


def read_mask(given: Any, height: int, width: int, where: str) -> rle.Counts:
    """Run lengths of an object's mask. Raises SampleError."""
    if isinstance(given, list):
        return draw(given, height, width, where)
    if not isinstance(given, dict):
        raise _unreadable(where, "is neither a list of polygons nor run lengths")
    size, counts = given.get("size"), given.get("counts")
    if size != [height, width]:
        raise SampleError(
            "mask of another size",
            f"{where}: its mask has the size {str(size)[:50]} (rows, columns), the image is "
            f"{height} by {width}",
        )
    try:
        if isinstance(counts, str):
            return rle.parse(counts.encode("ascii"), height, width)
        if not isinstance(counts, list) or not all(
            type(value) is int and 0 <= value <= height * width for value in counts
        ):
            raise ValueError("counts are neither text nor integers within the image's size")
        return rle.check(counts, height, width)
    except ValueError as error:
        raise _unreadable(where, f"can't be read: {error}") from None


def draw(polygons: Sequence[Any], height: int, width: int, where: str) -> rle.Counts:
    """Run lengths of polygons, each a flat list x, y, x, y, … of at least three corners."""
    from pycocotools import mask

    if not polygons:
        raise _unreadable(where, "has no polygon")
    rings = [_ring(polygon, height, width, where) for polygon in polygons]
    drawn = mask.merge(mask.frPyObjects(rings, height, width))
    return rle.parse(drawn["counts"], height, width)


def _ring(polygon: Any, height: int, width: int, where: str) -> list[float]:
    if (
        not isinstance(polygon, list)
        or len(polygon) < 6
        or len(polygon) % 2
        or not all(map(is_number, polygon))
    ):
        raise _unreadable(where, "has a polygon that is not at least three pairs of numbers")
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    cut = np.clip(corners, 0, [width, height])
    if not (np.abs(corners - cut) <= ROUNDING).all():  # also NaN and infinity
        raise SampleError(
            "polygon outside the image",
            f"{where}: a polygon has corners outside the image, {width} wide and {height} high",
        )
    return [float(value) for value in cut.ravel()]


def _unreadable(where: str, why: str) -> SampleError:
    return SampleError("unreadable mask", f"{where}: its segmentation {why}")
