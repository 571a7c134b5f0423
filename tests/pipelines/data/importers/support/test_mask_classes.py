"""What the values, palettes and colours of masks mean, and what is asked."""

from __future__ import annotations

import numpy as np
import pytest
from layouts.pixels import regions, voc_palette

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import IGNORED
from pipelines.data.importers.support.mask_classes import (
    MaskClasses,
    infer_classes,
    of_threshold,
    parse_colours,
)
from pipelines.data.importers.support.mask_files import MaskPixels
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError


def grey(*values: int, count: int = 3, dtype: type = np.uint8) -> list[tuple[str, MaskPixels]]:
    table = np.array(values, dtype)
    return [(f"{n}.png", MaskPixels(table[regions(n, len(values))], False)) for n in range(count)]


def indexed(pixels: np.ndarray, *colours: int, name: str = "p.png") -> list[tuple[str, MaskPixels]]:
    return [(name, MaskPixels(pixels.astype(np.uint8), False, tuple(colours)))]


@pytest.mark.parametrize(
    ("values", "classes", "last"),
    [
        ((0, 255), ("background", "foreground"), 1),
        ((0, 128, 255), ("0", "128", "255"), 2),
        ((255, 128, 0), ("0", "128", "255"), 0),
        ((0, 85, 170, 255), ("0", "85", "170", "255"), 3),
        ((0, 64, 128), ("0", "64", "128"), 2),
        ((50, 200), ("50", "200"), 1),
        ((0, 1, 2), ("0", "1", "2"), 2),
        ((0, 1, 255), ("0", "1"), IGNORED),
        ((0, 15, 255), tuple(map(str, range(16))), IGNORED),
        ((0, 31, 255), tuple(map(str, range(32))), IGNORED),
    ],
)
def test_values_far_apart_are_levels_and_others_are_numbers(
    values: tuple[int, ...], classes: tuple[str, ...], last: int
) -> None:
    """Of numbers, 255 is ignored; of levels it is a class."""
    inferred = infer_classes(grey(*values))
    assert inferred.classes == classes
    pixels = inferred.apply(grey(*values)[0][1], "x")
    assert pixels[regions(0, len(values)) == len(values) - 1].tolist()[0] == last


def test_masks_of_two_programs_are_asked_about() -> None:
    """0 and 1 in some files, 0 and 255 in others: 255 may be the same class, or ignored."""
    mixed = [*grey(0, 1), *grey(0, 255)]
    with pytest.raises(AmbiguousError, match=r"0 and 1, as 2\.png, and some 0 and 255") as caught:
        infer_classes(mixed)
    options = [dict(reading.options) for reading in caught.value.readings]
    assert options == [{"threshold": "1"}, {"classes": "background,foreground"}]
    assert infer_classes(mixed, ["background", "foreground"]).ignored == (IGNORED,)
    for others in (grey(0, 1, 255), grey(0, 2)):  # the control: numbers of classes
        assert infer_classes([*mixed, *others]).ignored == (IGNORED,)


def test_values_can_be_named() -> None:
    inferred = infer_classes(grey(255, 128, 0), values="cup=0, disc=128,ignored=255")
    assert inferred.classes == ("cup", "disc")
    assert np.unique(inferred.apply(grey(255, 128, 0)[0][1], "x")).tolist() == [0, 1, IGNORED]
    with pytest.raises(UsageError, match="the value 255, which --option values doesn't name"):
        infer_classes(grey(255, 128, 0), values="cup=0,disc=128")
    with pytest.raises(UsageError, match="the option values can't be"):
        infer_classes(grey(0, 1), values="cup=red")


def soft(count: int = 3) -> list[tuple[str, MaskPixels]]:
    """Binary masks whose edges are blurred."""
    ramp = np.r_[np.zeros(40), np.arange(0, 256, 16), np.full(40, 255)].astype(np.uint8)
    return [(f"{n}.png", MaskPixels(np.tile(ramp, (20, 1)), False)) for n in range(count)]


def test_soft_edges_are_refused_with_the_option_that_fits() -> None:
    with pytest.raises(AmbiguousError, match=r"soft edges: .* 14 values between") as caught:
        infer_classes(soft())
    assert "--option threshold=128 " in caught.value.with_commands("a b", "to").hint
    assert "pack 'a b' --to to" in caught.value.with_commands("a b", "to").hint


def test_as_many_values_without_two_extremes_are_numbers_of_classes() -> None:
    """The control: 16 classes far from black and white."""
    inferred = infer_classes([("a", MaskPixels(np.arange(0, 160, dtype=np.uint8)[None], False))])
    assert len(inferred.classes) == 160


def test_a_threshold_makes_two_classes() -> None:
    inferred = of_threshold(128, ())
    assert inferred.threshold == 128
    assert inferred.classes == ("background", "foreground")
    with pytest.raises(UsageError, match="2 classes, 3 are named"):
        of_threshold(128, ("a", "b", "c"))


RED, GREEN = 0xFF0000, 0x00FF00


def test_one_palette_is_read_by_index() -> None:
    pixels = regions(0, 3)
    masks = [*indexed(pixels, 0, RED, GREEN), *indexed(pixels > 0, 0, RED)]  # shorter, and equal
    inferred = infer_classes(masks)
    assert inferred.classes == ("0", "1", "2")
    np.testing.assert_array_equal(inferred.apply(masks[0][1], "x"), pixels)


def test_different_palettes_are_never_read_by_index() -> None:
    pixels = regions(0, 3)
    masks = [*indexed(pixels, 0, RED, GREEN), *indexed(pixels, 0, GREEN, RED)]
    inferred = infer_classes(masks)
    assert inferred.classes == ("#000000", "#00ff00", "#ff0000")
    first, second = (inferred.apply(mask, "x") for _, mask in masks)
    np.testing.assert_array_equal(first, np.array([0, 2, 1])[pixels])
    np.testing.assert_array_equal(second, pixels)
    with pytest.raises(UsageError, match=r"different palettes: that of p\.png differs"):
        infer_classes(masks, palette="index")


def test_a_palette_that_differs_later_is_refused() -> None:
    """As by `apply`, for a file that has changed since."""
    inferred = infer_classes(indexed(regions(0, 3), 0, RED, GREEN))
    ((_, other),) = indexed(regions(0, 3), 0, GREEN, RED)
    with pytest.raises(SampleError, match=r"b\.png has another palette"):
        inferred.apply(other, "b.png")


def test_palettes_and_grey_values_together_are_asked_about() -> None:
    masks = [*indexed(regions(0, 3), 0, RED, GREEN), *grey(0, 1, 2)]
    with pytest.raises(UsageError, match="some masks have a palette of colours, and some grey"):
        infer_classes(masks)
    assert infer_classes(masks, palette="index").classes == ("0", "1", "2")
    assert len(infer_classes(masks, palette="colour").classes) == 5
    table = [value * 0x010101 for value in range(3)]
    assert infer_classes([*indexed(regions(0, 3), *table), *grey(0, 1, 2)]).classes == tuple("012")


def test_named_colours_apply_to_palettes() -> None:
    named = parse_colours("sky=#000000,cat=#ff0000,ignored=#00ff00")
    ((_, mask),) = indexed(regions(0, 3), 0, RED, GREEN)
    assert np.unique(named.apply(mask, "x")).tolist() == [0, 1, IGNORED]


def test_a_value_without_a_class_is_named_by_its_colour() -> None:
    voc = [r << 16 | g << 8 | b for r, g, b in voc_palette()]
    inferred = MaskClasses(("a", "b"), False, None, (IGNORED,), "", tuple(voc))
    ((_, mask),) = indexed(regions(0, 4), *voc)
    with pytest.raises(SampleError, match=r"x has the value 2 \(#008000\), which is not a class"):
        inferred.apply(mask, "x")
    with pytest.raises(SampleError, match="x has the value #808000, which is not a class"):
        parse_colours("a=#000000,b=#800000,c=#008000").apply(mask, "x")


def numbered(sizes: tuple[int, ...]) -> list[tuple[str, MaskPixels]]:
    """Masks with 1 to n, each in a piece of its own."""
    masks = []
    for size in sizes:
        pixels = np.zeros((9, 4 * size), np.uint8)
        for number in range(size):
            pixels[2:7, 4 * number + 1 : 4 * number + 3] = number + 1
        masks.append((f"{size}.png", MaskPixels(pixels, False)))
    return masks


def test_numbers_of_objects_are_not_taken_for_classes() -> None:
    with pytest.raises(AmbiguousError, match="could be the numbers of objects: 1 to 5") as caught:
        infer_classes(numbered((3, 5, 4)))
    assert "--format instance_masks " in caught.value.with_commands("a", "to").hint
    assert infer_classes(numbered((3, 5, 4)), ["x", "a", "b", "c", "d", "e"]).classes[0] == "x"


@pytest.mark.parametrize("kind", ["equal numbers", "two pieces", "gaps"])
def test_classes_are_not_taken_for_objects(kind: str) -> None:
    """The controls: one thing less that speaks for objects."""
    masks = numbered((4, 4, 4) if kind == "equal numbers" else (3, 5, 4))
    if kind == "two pieces":
        masks[0][1].pixels[0, 0] = 1
    if kind == "gaps":
        masks = [(name, MaskPixels(2 * mask.pixels, False)) for name, mask in masks]
    assert len(infer_classes(masks).classes) > 4


def test_numbers_above_254_are_no_classes() -> None:
    with pytest.raises(TesseraError, match="values up to 900") as caught:
        infer_classes(grey(0, 300, 900, dtype=np.uint16))
    assert "--format instance_masks" in (caught.value.hint or "")
