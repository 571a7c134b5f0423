"""Annotations on images: where they are drawn, in which colours, and with whose words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from pipelines.data.annotations import IGNORED, Mask, Objects
from pipelines.visuals.draw import colour, draw, hex_colour, ink

CLASSES = ("cat", "dog", "bird")


def objects(
    boxes: list[list[float]], labels: list[int], *, crowd: bool = False, masks: bool = False
) -> Objects:
    """Objects in an image of 60 by 40; a mask fills its box."""
    texts = []
    for left, top, right, bottom in boxes:
        pixels = np.zeros((40, 60), np.uint8, order="F")
        pixels[int(top) : int(bottom), int(left) : int(right)] = 1
        texts.append(coco.encode(pixels)["counts"])
    return Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.full(len(labels), crowd),
        tuple(texts) if masks else None,
    )


def plain(value: int = 128) -> Image.Image:
    return Image.new("RGB", (60, 40), (value, value, value))


def test_a_class_has_one_colour_and_classes_have_different_ones() -> None:
    colours = [colour(index) for index in range(200)]
    assert len(set(colours)) == 200
    assert colours == [colour(index) for index in range(200)]
    first = np.array(colours[:20], int)
    apart = np.abs(first[:, None] - first[None]).sum(-1)
    assert apart[~np.eye(20, dtype=bool)].min() > 40
    assert hex_colour(0) == "#{:02x}{:02x}{:02x}".format(*colours[0])


def test_names_are_legible_on_every_colour_and_lines_on_dark_and_bright() -> None:
    def light(shade: tuple[int, int, int]) -> float:  # WCAG 2, relative luminance
        parts = np.array(shade) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for index in range(1000):
        assert contrast(colour(index), ink(colour(index))) > 4.5, index
        # A line has a dark rim: one of the two stands out, whatever is behind.
        rim = (16, 18, 24)
        for ground in ((0, 0, 0), (128, 128, 128), (255, 255, 255)):
            assert max(contrast(colour(index), ground), contrast(rim, ground)) > 2.5, index


@pytest.mark.parametrize("factor", [1, 4])
def test_a_box_is_drawn_where_it_is(factor: int) -> None:
    drawn = np.asarray(draw(plain(), objects([[10, 12, 50, 36]], [1]), ["a"], side=60 * factor))
    assert drawn.shape == (40 * factor, 60 * factor, 3)
    tint = (drawn == colour(1)).all(-1)
    rows, columns = np.nonzero(tint)
    assert (rows.min(), columns.min()) == (12 * factor, 10 * factor)
    assert (rows.max(), columns.max()) == (36 * factor - 1, 50 * factor - 1)
    inside = drawn[16 * factor : 30 * factor, 14 * factor : 44 * factor]
    assert (inside == 128).all()


def test_boxes_at_the_edge_tiny_and_none_at_all() -> None:
    edge = objects([[0, 0, 60, 40], [30, 20, 30.4, 20.4], [59, 39, 60, 40]], [0, 1, 2])
    assert draw(plain(), edge, CLASSES).size == (60, 40)
    assert draw(plain(), edge, CLASSES, side=7).size == (7, 5)
    none = draw(plain(), objects([], []), CLASSES)
    assert none.tobytes() == plain().tobytes() == draw(plain(), None, ()).tobytes()


def test_masks_tint_their_pixels_and_no_others() -> None:
    drawn = np.asarray(draw(plain(), objects([[10, 10, 30, 30]], [2], masks=True), ["a"]))
    assert (drawn[10, 10:30] == colour(2)).all(), "the outline"
    inner = drawn[12:28, 12:28]
    assert (inner != 128).any(-1).all()
    assert len(np.unique(inner.reshape(-1, 3), axis=0)) == 1
    outside = np.ones((40, 60), bool)
    outside[10:30, 10:30] = False
    assert (drawn[outside] == 128).all()


def test_classes_of_pixels_have_their_colours_and_ignored_ones_none() -> None:
    pixels = np.zeros((40, 60), np.uint8)
    pixels[:, 20:40], pixels[:, 40:] = 1, IGNORED
    drawn = np.asarray(draw(plain(128), Mask(pixels), CLASSES)).astype(int)
    for columns, tint in (((0, 20), colour(0)), ((20, 40), colour(1)), ((40, 60), (128,) * 3)):
        expected = (128 + np.array(tint)) / 2
        assert np.abs(drawn[:, slice(*columns)] - expected).max() <= 1


def test_a_crowd_has_broken_lines() -> None:
    for crowd in (False, True):
        boxed = objects([[5, 5, 55, 35]], [1], crowd=crowd)
        top = np.asarray(draw(plain(), boxed, ["a"]))[5, 10:50]
        assert bool((top != colour(1)).any()) == crowd


def test_names_stand_in_the_picture_and_only_where_there_is_room() -> None:
    named = draw(plain(), objects([[20, 20, 50, 39]], [1]), CLASSES, side=240)
    alone = draw(plain(), objects([[20, 20, 50, 39]], [1]), CLASSES[:1], side=240)
    assert named.tobytes() != alone.tobytes()
    many = objects([[i, i, i + 3, i + 3] for i in range(30)], [1] * 30)
    again = draw(plain(), many, CLASSES, side=240).tobytes()
    assert again == draw(plain(), many, ("x", "y", "z"), side=240).tobytes()


def test_other_peoples_words_are_only_text() -> None:
    words = ["<b>\x1b[31m\n\0" * 50, "", "\u202etxet\u202c", "日本語", "x" * 5000]
    boxed = objects([[5 * i, 5, 5 * i + 20, 30] for i in range(5)], [0, 1, 2, 3, 4])
    drawn = draw(plain(), boxed, words, caption=words[0] + words[4], side=300)
    assert drawn.width == 300
    assert 200 < drawn.height < 280


def test_a_caption_is_below_and_the_picture_stays() -> None:
    bare = draw(plain(), None, ())
    told = draw(plain(), None, (), caption="a cat")
    assert told.crop((0, 0, 60, 40)).tobytes() == bare.tobytes()
    assert told.height > 40
    assert len(told.crop((0, 40, *told.size)).getcolors(10_000) or []) > 1


def test_tensors_and_images_are_drawn_alike_and_not_changed() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), np.uint8))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    before = pixels.clone()
    boxed = objects([[10, 10, 30, 30]], [2], masks=True)
    assert draw(pixels, boxed, CLASSES).tobytes() == draw(image, boxed, CLASSES).tobytes()
    assert torch.equal(pixels, before)
    grey = draw(pixels[:1], boxed, CLASSES)
    assert grey.tobytes() == draw(Image.fromarray(pixels[0].numpy()), boxed, CLASSES).tobytes()
