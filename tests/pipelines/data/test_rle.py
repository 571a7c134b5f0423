"""Run lengths agree with pycocotools, and no text raises more than a ValueError."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco

from pipelines.data import rle

# pycocotools' arrays don't know NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
RANDOM = np.random.default_rng(0)


def masks(count: int) -> list[np.ndarray]:
    result = []
    for number in range(count):
        height, width = RANDOM.integers(1, 40, 2)
        mask = (RANDOM.random((height, width)) < RANDOM.random()).astype(np.uint8)
        if number % 10 == 0:
            mask[:] = number % 20 == 0
        result.append(mask)
    return result


def test_run_lengths_agree_with_pycocotools() -> None:
    for mask in masks(400):
        counts = rle.of_mask(mask)
        text = rle.write(counts)
        true = coco.encode(np.asfortranarray(mask))
        assert text == true["counts"]
        read = rle.parse(text, *mask.shape)
        np.testing.assert_array_equal(read, counts)
        np.testing.assert_array_equal(rle.to_mask(read, *mask.shape), mask)
        assert rle.area(read) == coco.area(true)
        if mask.any():
            left, top, width, height = coco.toBbox(true)
            box = rle.box(read, mask.shape[0])
            assert box == (left, top, left + width, top + height)


def test_lengths_of_large_images_are_exact() -> None:
    for counts in ([99_999_999, 1], [0, 100_000_000], [50_000_000, 3, 49_999_000, 997]):
        text = rle.write(np.array(counts))
        np.testing.assert_array_equal(rle.parse(text, 10_000, 10_000), counts)


@pytest.mark.parametrize(
    ("counts", "merged"),
    [
        ([0, 3, 0, 2, 4, 0, 0, 1], [0, 5, 4, 1]),
        ([0, 0, 5, 5], [5, 5]),
        ([10, 0], [10]),
        ([0, 10, 0], [0, 10]),
    ],
)
def test_empty_runs_are_merged(counts: list[int], merged: list[int]) -> None:
    np.testing.assert_array_equal(rle.check(counts, 1, 10), merged)
    text = rle.write(np.array(counts))
    np.testing.assert_array_equal(rle.parse(text, 1, 10), merged)
    true = coco.decode({"size": [1, 10], "counts": text})
    np.testing.assert_array_equal(rle.to_mask(np.array(merged), 1, 10), true)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"/",
        b"P",  # more is to come
        b"PPPPPPPPPPPP0",
        b"oooooooo0",
        b"4",
        b"o0",  # a length below zero
        rle.write(np.array([50, 51])),
        rle.write(np.array([50, 49])),
        b"0" * 1000,
        rle.write(np.array([0, 100])) + b"0" * 500,
    ],
)
def test_lengths_that_don_t_fill_the_image_are_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"run|empty|characters|short"):
        rle.parse(text, 10, 10)


def test_any_text_is_read_or_refused() -> None:
    """If it is read, pycocotools reads the same mask. Random text isn't passed to pycocotools."""
    good = [rle.write(rle.of_mask(mask)) for mask in masks(50)]
    taken = 0
    for number in range(20_000):
        if number % 2:
            text = RANDOM.integers(0, 256, RANDOM.integers(0, 30), np.uint8).tobytes()
        else:
            raw = bytearray(good[number % len(good)])
            raw[RANDOM.integers(len(raw))] = 48 + RANDOM.integers(64)
            text = bytes(raw)
        height, width = 1 + number % 40, 1 + number % 37
        try:
            counts = rle.parse(text, height, width)
        except ValueError:
            continue
        taken += 1
        assert counts.sum() == height * width
        true = coco.decode({"size": [height, width], "counts": text})
        np.testing.assert_array_equal(rle.to_mask(counts, height, width), true)
    assert taken < 200
