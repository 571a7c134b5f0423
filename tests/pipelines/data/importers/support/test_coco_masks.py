"""Masks of COCO: polygons and run lengths of two kinds."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipelines.data import rle
from pipelines.data.importers.support.coco_masks import read_mask
from pipelines.data.sample_error import SampleError

HEIGHT, WIDTH = 4, 6


def test_three_forms_of_one_mask_are_the_same() -> None:
    """Columns 1 to 2 of rows 0 to 3: run lengths go down the columns."""
    from pycocotools import mask

    polygon = read_mask([[1, 0, 3, 0, 3, 4, 1, 4]], HEIGHT, WIDTH, "a")
    numbers = read_mask({"size": [HEIGHT, WIDTH], "counts": [4, 8, 12]}, HEIGHT, WIDTH, "a")
    packed = mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": [4, 8, 12]}, HEIGHT, WIDTH)
    text = {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}
    assert rle.area(polygon) == 8
    assert list(polygon) == list(numbers) == list(read_mask(text, HEIGHT, WIDTH, "a"))


@pytest.mark.parametrize(
    ("given", "reason", "message"),
    [
        (7, "unreadable mask", "neither a list of polygons nor run lengths"),
        ([], "unreadable mask", "has no polygon"),
        ([[1, 2, 3, 4]], "unreadable mask", "not at least three pairs"),
        ([[1, 2, 3, 4, 5]], "unreadable mask", "not at least three pairs"),
        ([[1, 2, 3, "4", 5, 6]], "unreadable mask", "not at least three pairs"),
        ([[0, 0, 9, 0, 0, 4]], "polygon outside the image", "6 wide and 4 high"),
        ([[0, 0, float("nan"), 0, 0, 4]], "polygon outside the image", "6 wide and 4 high"),
        ({"size": [6, 4], "counts": [24]}, "mask of another size", "(rows, columns)"),
        ({"size": [4, 6], "counts": [25]}, "unreadable mask", "integers within the image's size"),
        ({"size": [4, 6], "counts": [True]}, "unreadable mask", "integers within"),
        ({"size": [4, 6], "counts": [4, 8]}, "unreadable mask", "can't be read"),
        ({"size": [4, 6], "counts": "\xff"}, "unreadable mask", "can't be read"),
    ],
)
def test_damaged_masks_are_refused(given: Any, reason: str, message: str) -> None:
    with pytest.raises(SampleError, match=re.escape(message)) as caught:
        read_mask(given, HEIGHT, WIDTH, "a.jpg, object 3")
    assert caught.value.reason == reason
    assert caught.value.message.startswith("a.jpg, object 3")
