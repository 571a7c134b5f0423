"""Annotations: invalid ones are refused with a reason, and encoding is lossless."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from models.core.errors import TesseraError
from pipelines.data import rle
from pipelines.data.annotations import (
    IGNORED,
    Annotation,
    Mask,
    Objects,
    check,
    clip,
    count,
    decode_mask,
    decode_objects,
    drop_damaged,
    encode,
    mask_pixels,
    resize,
)
from pipelines.data.images import encode_png
from pipelines.data.sample_error import SampleError

# pycocotools' arrays don't know NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
HEIGHT, WIDTH, CLASSES = 30, 40, 3
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "classes": CLASSES, "where": "cat.jpg"}
GOOD = [[1.0, 2.0, 11.5, 12.25], [0.0, 0.0, 40.0, 30.0]]


def objects(
    boxes: Any = GOOD, labels: Any = (0, 2), crowd: Any = (0, 1), masks: Any = None
) -> Objects:
    return Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, bool),
        masks,
    )


def masks_of(count: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(count)
    result = (random.random((count, height, width)) < 0.3).astype(np.uint8)
    return tuple(result)


def texts(masks: Any) -> tuple[bytes, ...]:
    return tuple(rle.write(rle.of_mask(mask)) for mask in masks)


def reason(annotation: Annotation, **other: Any) -> str:
    with pytest.raises(SampleError, match=r"^cat\.jpg") as caught:
        check(annotation, **{**SIZE, **other})
    return caught.value.reason


@pytest.mark.fault(29)
def test_valid_annotations_are_accepted() -> None:
    check(objects(), **SIZE)
    check(objects(masks=texts(masks_of(2))), **SIZE)
    check(objects([], [], []), **SIZE)
    check(objects([], [], [], ()), **SIZE)
    check(Mask(np.full((HEIGHT, WIDTH), 2, np.uint8)), **SIZE)
    check(Mask(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3), **SIZE)
    check(objects([[0, 0, 1, 1]], [0], [0]), height=1, width=1, classes=1, where="dot.png")


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([np.nan, 2, 11, 12], "box not finite"),
        ([1, 2, np.inf, 12], "box not finite"),
        ([1, -np.inf, 11, 12], "box not finite"),
        ([1, 2, 1, 12], "box without area"),
        ([1, 2, 11, 2], "box without area"),
        ([11, 2, 1, 12], "box inverted"),
        ([1, 12, 11, 2], "box inverted"),
        ([-1, 2, 11, 12], "box outside the image"),
        ([1, 2, 40.01, 12], "box outside the image"),
        ([1, 2, 11, 31], "box outside the image"),
        ([100, 100, 110, 110], "box outside the image"),
    ],
)
def test_an_invalid_box_is_refused_with_its_reason(box: list[float], message: str) -> None:
    assert reason(objects([GOOD[0], box])) == message
    with pytest.raises(SampleError, match="object 1"):
        check(objects([GOOD[0], box]), **SIZE)


@pytest.mark.fault(26)
def test_normalised_boxes_are_detected() -> None:
    assert reason(objects([[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]])) == "box normalised"
    check(objects([[0.1, 0.2, 0.5, 0.6], [0, 0, 2, 2]]), **SIZE)


@pytest.mark.fault(27)
@pytest.mark.parametrize("label", [-1, -100, CLASSES, 10**15])
def test_an_unknown_class_is_refused(label: int) -> None:
    assert reason(objects(labels=[0, label])) == "unknown class"


@pytest.mark.fault(27)
def test_different_numbers_of_boxes_labels_and_masks_are_refused() -> None:
    assert reason(objects(labels=[0])) == "counts differ"
    assert reason(objects(crowd=[0])) == "counts differ"
    assert reason(objects(masks=texts(masks_of(1)))) == "counts differ"


def test_a_mask_must_have_the_size_of_the_image_and_pixels() -> None:
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    good = masks_of(1)[0]
    assert reason(objects(masks=texts([good, empty]))) == "mask without pixels"
    other = texts([good, *masks_of(1, HEIGHT + 1)])
    assert reason(objects(masks=other)) == "mask of another size"
    assert reason(objects(masks=(texts([good])[0], b"\xff"))) == "unreadable mask"
    assert reason(Mask(np.zeros((WIDTH, HEIGHT), np.uint8))) == "mask of another size"
    assert reason(Mask(np.full((HEIGHT, WIDTH), CLASSES, np.uint8))) == "unknown class"
    assert reason(Mask(np.full((HEIGHT, WIDTH), IGNORED, np.uint8))) == "mask without pixels"


def test_only_boxes_within_rounding_of_the_edge_are_clipped() -> None:
    boxes = np.array([[-0.5, 2, 40.5, 12], [-0.6, 2, 3, 12], [1, 2, 3, 30.4], [1, 2, np.nan, 4]])
    cut = clip(boxes, HEIGHT, WIDTH)
    np.testing.assert_array_equal(cut[0], [0, 2, 40, 12])
    np.testing.assert_array_equal(cut[1], boxes[1])
    np.testing.assert_array_equal(cut[2], [1, 2, 3, 30])
    np.testing.assert_array_equal(cut[3], boxes[3])


def test_annotations_are_read_as_written() -> None:
    for number in range(50):
        random = np.random.default_rng(number)
        edges = np.sort(random.random((number % 7, 2, 2)) * [WIDTH, HEIGHT], axis=1)
        size = len(edges)
        original = objects(
            edges.reshape(size, 4),
            random.integers(0, CLASSES, size),
            random.integers(0, 2, size),
            texts(masks_of(size)) if number % 2 else None,
        )
        extension, data = encode(original)
        back = decode_objects(data, **SIZE)
        assert extension == "json"
        for name in ("boxes", "labels", "crowd"):
            np.testing.assert_array_equal(getattr(back, name), getattr(original, name))
            assert getattr(back, name).dtype == getattr(original, name).dtype
        assert back.masks == original.masks
        assert encode(back) == (extension, data)


def test_equal_annotations_have_equal_bytes() -> None:
    one = objects([[-0.0, 0, 3, 4]], [1], [0])
    two = Objects(np.array([[0, 0, 3, 4]]), np.array([1], np.int32), np.array([False]))
    assert encode(one)[1] == encode(two)[1]
    assert encode(one)[1] == b'{"boxes":[[0.0,0.0,3.0,4.0]],"crowd":[0],"labels":[1]}'
    with pytest.raises(ValueError, match="JSON"):
        encode(objects([[np.nan, 0, 1, 1]], [0], [0]))


def test_mask_values_are_read_as_written() -> None:
    pixels = np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)
    pixels[3:5] = IGNORED
    extension, data = encode(Mask(pixels))
    back = decode_mask(data, **SIZE)
    assert extension == "mask.png"
    np.testing.assert_array_equal(back.pixels, pixels)
    assert count(back, 3) == [int((pixels == value).sum()) for value in range(3)]


FIELDS = {"boxes": [[1.0, 2.0, 3.0, 4.0]], "crowd": [0], "labels": [1]}


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"boxes":[],"crowd":[]}',
        b'{"boxes":[],"crowd":[],"labels":[],"more":1}',
        b'{"boxes":[],"boxes":[],"crowd":[],"labels":[]}',
        b'{"boxes":[[1,2,3,NaN]],"crowd":[0],"labels":[1]}',
        b'{"boxes":[[1,2,3,Infinity]],"crowd":[0],"labels":[1]}',
        b'{"boxes":[[1,2,3,1e999]],"crowd":[0],"labels":[1]}',
        b'{"boxes":[[1,2,3,' + b"9" * 400 + b']],"crowd":[0],"labels":[1]}',
        b'{"boxes":[[1,2,3,4]],"crowd":[0],"labels":[' + b"9" * 5000 + b"]}",
        b"[" * 200_000,
        b'{"boxes":' * 200_000,
        *(
            json.dumps({**FIELDS, name: value}).encode()
            for name, values in {
                "boxes": (None, 1, "1", [1, 2, 3, 4], [[1, 2, 3]], [["1", 2, 3, 4]], [[True] * 4]),
                "labels": (None, [1.0], ["cat"], [True], [[1]], [10**30], [-1], [1, 1]),
                "crowd": (None, [2], [-1], [False], [0.0], [], {"0": 0}),
                "masks": (None, "x", [1], ["\u00e9"], [""], ["4"], [["4"]], ["4", "4"]),
            }.items()
            for value in values
            if (name, value) != ("masks", None)
        ),
    ],
)
def test_other_json_is_refused(data: bytes) -> None:
    with pytest.raises(SampleError, match=r"^cat\.jpg"):
        decode_objects(data, **SIZE)


def test_the_unchanged_fields_are_accepted() -> None:
    """Control of the test above."""
    result = decode_objects(json.dumps(FIELDS).encode(), **SIZE)
    assert (result.boxes.tolist(), result.labels.tolist()) == (FIELDS["boxes"], FIELDS["labels"])


def png(pixels: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", **options)
    return out.getvalue()


def test_other_mask_files_are_refused() -> None:
    pixels = np.ones((HEIGHT, WIDTH), np.uint8)
    palette = Image.fromarray(pixels).convert("P")
    out = io.BytesIO()
    palette.save(out, format="PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    good = encode_png(pixels)
    decode_mask(good, **SIZE)
    for data in (
        b"",
        good[:20],
        good[:-20],
        good[:60] + b"x" + good[61:],
        out.getvalue(),
        png(np.ones((HEIGHT, WIDTH, 3), np.uint8)),
        png(np.ones((HEIGHT, WIDTH), np.uint16)),
        png(pixels, transparency=1),
        png(pixels, exif=turned),
        encode_png(np.ones((WIDTH, HEIGHT), np.uint8)),
        encode_png(np.full((HEIGHT, WIDTH), 3, np.uint8)),
        encode_png(np.ones((HEIGHT + 1, WIDTH), np.uint8)),
    ):
        with pytest.raises(TesseraError, match=r"^cat\.jpg"):
            decode_mask(data, **SIZE)


def test_damaged_bytes_are_refused_or_valid() -> None:
    """Bytes changed anywhere: an annotation that `check` accepts, or a TesseraError."""
    random = np.random.default_rng(0)
    whole = encode(objects(masks=texts(masks_of(2))))[1]
    mask = encode(Mask(np.ones((HEIGHT, WIDTH), np.uint8)))[1]
    refused = 0
    for number in range(4000):
        raw = bytearray(mask if number % 2 else whole)
        for _ in range(random.integers(1, 4)):
            raw[random.integers(len(raw))] = random.integers(256)
        try:
            result: Annotation = (decode_mask if number % 2 else decode_objects)(bytes(raw), **SIZE)
        except TesseraError:
            refused += 1
        else:
            check(result, **SIZE)
    assert refused > 3000


def test_boxes_are_scaled_and_masks_use_nearest_neighbours() -> None:
    masks = masks_of(2, 30, 40)
    original = objects(masks=texts(masks))
    small = resize(original, (30, 40), (15, 10))
    assert isinstance(small, Objects)
    np.testing.assert_allclose(small.boxes, np.array(GOOD) * [0.25, 0.5, 0.25, 0.5])
    check(small, height=15, width=10, classes=CLASSES, where="x")
    for number, text in enumerate(small.masks or ()):
        true = np.asarray(Image.fromarray(masks[number]).resize((10, 15), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(coco.decode({"size": [15, 10], "counts": text}), true)
    assert resize(original, (30, 40), (30, 40)) is original
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    larger = resize(Mask(pixels), (3, 4), (6, 8))
    assert isinstance(larger, Mask)
    np.testing.assert_array_equal(larger.pixels, pixels.repeat(2, 0).repeat(2, 1))


def test_a_tiny_mask_keeps_one_pixel_when_scaled() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[33, 39] = 1
    small = resize(objects([[39, 33, 40, 34]], [0], [0], texts([mask])), (40, 40), (4, 4))
    assert isinstance(small, Objects)
    np.testing.assert_array_equal(np.argwhere(mask_pixels(small, 4, 4)[0]), [[3, 3]])
    check(small, height=4, width=4, classes=1, where="x")


def test_counts_exclude_crowds() -> None:
    assert count(objects(), 3) == [1, 0, 0]
    assert count(objects(crowd=[0, 0]), 3) == [1, 0, 1]
    assert count(objects([], [], []), 3) == [0, 0, 0]


def test_mask_pixels_are_those_of_the_run_lengths() -> None:
    masks = masks_of(3)
    original = objects([GOOD[0]] * 3, [0] * 3, [0] * 3, texts(masks))
    np.testing.assert_array_equal(mask_pixels(original, HEIGHT, WIDTH), masks)
    assert mask_pixels(objects(), HEIGHT, WIDTH).shape == (2, HEIGHT, WIDTH)


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(SampleError("box inverted", "x is", hint="turn it")))
    assert (error.reason, error.message, error.hint) == ("box inverted", "x is", "turn it")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_without_the_damaged_objects_passes(seed: int) -> None:
    """Boxes of all kinds of damage among good ones: each good one stays, in its order."""
    dice = np.random.default_rng(seed)
    count_of_objects = int(dice.integers(1, 12))
    bad = np.array([[5, 5, 5, 9], [9, 5, 3, 9], [5, 5, 9, 99], [np.nan, 1, 5, 5], [-3, 1, 5, 5]])
    good = dice.random(count_of_objects) < 0.5
    boxes = np.array([[1 + n, 2, 9 + n, 12] for n in range(count_of_objects)], np.float64)
    boxes[~good] = bad[dice.integers(0, len(bad), (~good).sum())]
    labels = dice.integers(0, CLASSES, count_of_objects)
    crowd = dice.random(count_of_objects) < 0.2
    kept, dropped = drop_damaged(Objects(boxes, labels, crowd), **SIZE)
    check(kept, **SIZE)
    np.testing.assert_array_equal(kept.boxes, boxes[good])
    np.testing.assert_array_equal(kept.labels, labels[good])
    np.testing.assert_array_equal(kept.crowd, crowd[good])
    assert sorted(d.label for d in dropped if d.label is not None) == sorted(labels[~good])
    if not good.all():
        with pytest.raises(SampleError):
            check(Objects(boxes, labels, crowd), **SIZE)
