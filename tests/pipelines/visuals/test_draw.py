"""Drawn panels: positions, colours and names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.core.family import Panel
from pipelines.visuals.draw import NO_CLASS, colour, draw, hex_colour, text_colour

CLASSES = ("cat", "dog", "bird")
EMPTY = Panel(torch.full((3, 40, 60), 128, dtype=torch.uint8))


def panel(
    boxes: list[list[float]], labels: list[int], *, crowd: bool = False, masks: bool = False
) -> Panel:
    """Objects in a grey image of 60 by 40; a mask fills its box."""
    pixels = torch.zeros(len(boxes), 40, 60, dtype=torch.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes):
        pixels[number, int(top) : int(bottom), int(left) : int(right)] = 1
    return replace(
        EMPTY,
        boxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(labels),
        crowd=torch.full((len(labels),), crowd),
        masks=pixels if masks else None,
    )


def test_a_class_has_one_colour_and_classes_have_different_ones() -> None:
    colours = [colour(index) for index in range(200)]
    assert len(set(colours)) == 200
    assert colours == [colour(index) for index in range(200)]
    first = np.array(colours[:20], int)
    apart = np.abs(first[:, None] - first[None]).sum(-1)
    assert apart[~np.eye(20, dtype=bool)].min() > 40
    assert hex_colour(0) == "#{:02x}{:02x}{:02x}".format(*colours[0])


def test_names_and_lines_have_contrast_on_every_background() -> None:
    def light(shade: tuple[int, int, int]) -> float:  # WCAG 2, relative luminance
        parts = np.array(shade) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for index in range(1000):
        assert contrast(colour(index), text_colour(colour(index))) > 4.5, index
        # A line has a dark rim: one of the two contrasts with any background.
        rim = (16, 18, 24)
        for ground in ((0, 0, 0), (128, 128, 128), (255, 255, 255)):
            assert max(contrast(colour(index), ground), contrast(rim, ground)) > 2.5, index


@pytest.mark.parametrize("factor", [1, 4])
def test_a_box_is_drawn_at_its_position(factor: int) -> None:
    drawn = np.asarray(draw(panel([[10, 12, 50, 36]], [1]), ["a"], side=60 * factor))
    assert drawn.shape == (40 * factor, 60 * factor, 3)
    tint = (drawn == colour(1)).all(-1)
    rows, columns = np.nonzero(tint)
    assert (rows.min(), columns.min()) == (12 * factor, 10 * factor)
    assert (rows.max(), columns.max()) == (36 * factor - 1, 50 * factor - 1)
    inside = drawn[16 * factor : 30 * factor, 14 * factor : 44 * factor]
    assert (inside == 128).all()


def test_boxes_at_the_edge_tiny_boxes_and_no_boxes() -> None:
    edge = panel([[0, 0, 60, 40], [30, 20, 30.4, 20.4], [59, 39, 60, 40]], [0, 1, 2])
    assert draw(edge, CLASSES).size == (60, 40)
    assert draw(edge, CLASSES, side=7).size == (7, 5)
    without_boxes = draw(panel([], []), CLASSES)
    assert without_boxes.tobytes() == bytes([128]) * (40 * 60 * 3) == draw(EMPTY, ()).tobytes()


def test_masks_colour_their_pixels_and_no_others() -> None:
    drawn = np.asarray(draw(panel([[10, 10, 30, 30]], [2], masks=True), ["a"]))
    assert (drawn[10, 10:30] == colour(2)).all(), "the outline"
    inner = drawn[12:28, 12:28]
    assert (inner != 128).any(-1).all()
    assert len(np.unique(inner.reshape(-1, 3), axis=0)) == 1
    outside = np.ones((40, 60), bool)
    outside[10:30, 10:30] = False
    assert (drawn[outside] == 128).all()


def test_pixels_have_the_colours_of_their_classes() -> None:
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[:, 20:40], mask[:, 40:] = 1, NO_CLASS
    drawn = np.asarray(draw(replace(EMPTY, mask=mask), CLASSES)).astype(int)
    for columns, tint in (((0, 20), colour(0)), ((20, 40), colour(1)), ((40, 60), (128,) * 3)):
        expected = (128 + np.array(tint)) / 2
        assert np.abs(drawn[:, slice(*columns)] - expected).max() <= 1


def test_a_crowd_has_dashed_lines() -> None:
    for crowd in (False, True):
        boxed = panel([[5, 5, 55, 35]], [1], crowd=crowd)
        top = np.asarray(draw(boxed, ["a"]))[5, 10:50]
        assert bool((top != colour(1)).any()) == crowd


def test_names_are_drawn_only_if_there_are_few_objects() -> None:
    named = draw(panel([[20, 20, 50, 39]], [1]), CLASSES, side=240)
    alone = draw(panel([[20, 20, 50, 39]], [1]), CLASSES[:1], side=240)
    assert named.tobytes() != alone.tobytes()
    many = panel([[i, i, i + 3, i + 3] for i in range(30)], [1] * 30)
    again = draw(many, CLASSES, side=240).tobytes()
    assert again == draw(many, ("x", "y", "z"), side=240).tobytes()


def test_malicious_class_names_are_drawn_as_text() -> None:
    words = ["<b>\x1b[31m\n\0" * 50, "", "\u202etxet\u202c", "日本語", "x" * 5000]
    boxed = panel([[5 * i, 5, 5 * i + 20, 30] for i in range(5)], [0, 1, 2, 3, 4])
    assert draw(boxed, words, side=300).size == (300, 200)


def test_grey_images_are_drawn_in_colour_and_not_changed() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 40, 60), np.uint8))
    before = pixels.clone()
    grey = replace(panel([[10, 10, 30, 30]], [2], masks=True), image=pixels)
    colour_image = replace(grey, image=pixels.expand(3, 40, 60))
    assert draw(grey, CLASSES).tobytes() == draw(colour_image, CLASSES).tobytes()
    assert torch.equal(pixels, before)
