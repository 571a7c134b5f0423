"""Boxes and masks turn with the image, and one damaged object doesn't hide the others."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from models.core.errors import UsageError
from pipelines.data import rle
from pipelines.data.annotations import check, mask_pixels
from pipelines.data.images import open_image
from pipelines.data.importers.support.object_lists import (
    Canvas,
    ObjectList,
    open_canvas,
    read_exif_option,
)
from pipelines.data.sample_error import SampleError

HEIGHT, WIDTH = 12, 20
BOX = (3, 2, 9, 7)


def photo(orientation: int) -> bytes:
    """A black image whose box is white, as it is stored."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_on_the_stored_pixels_are_turned_upright(orientation: int) -> None:
    data = photo(orientation)
    canvas = open_canvas(data, "x", "stored", (HEIGHT, WIDTH))
    assert canvas == Canvas(HEIGHT, WIDTH, orientation)
    objects = ObjectList(canvas, with_masks=True)
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    objects.add(0, BOX, "x", mask=rle.of_mask(pixels))
    found = objects.finish()
    upright = np.asarray(open_image(data, "x")) > 127
    rows, columns = np.nonzero(upright)
    height, width = upright.shape
    check(found, height=height, width=width, classes=1, where="x")
    assert found.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    np.testing.assert_array_equal(mask_pixels(found, height, width)[0], upright)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_stated_size_says_which_pixels_are_meant(orientation: int) -> None:
    data, upright = photo(orientation), (WIDTH, HEIGHT)
    assert open_canvas(data, "x", "", upright) == Canvas(*upright)
    assert open_canvas(data, "x", "", (0, 0)) == Canvas(*upright)
    assert open_canvas(data, "x", "upright", upright) == Canvas(*upright)
    with pytest.raises(SampleError, match=r"as its pixels are stored.*exif=stored") as caught:
        open_canvas(data, "x", "", (HEIGHT, WIDTH))
    assert caught.value.reason == "annotation of the stored pixels"
    for exif, size in (("stored", upright), ("upright", (HEIGHT, WIDTH)), ("", (1, 1))):
        with pytest.raises(SampleError) as caught:
            open_canvas(data, "x", exif, size)
        assert caught.value.reason == "annotation of another size"


def test_the_option_is_checked() -> None:
    assert read_exif_option({}) == ""
    assert read_exif_option({"exif": "stored"}) == "stored"
    with pytest.raises(UsageError, match="exif can't be 'left'"):
        read_exif_option({"exif": "left"})


def test_a_damaged_object_is_kept_apart() -> None:
    objects = ObjectList(Canvas(HEIGHT, WIDTH), with_masks=False)
    for number in range(3):
        with objects.one(number):
            if number == 1:
                raise SampleError("no box", "object 1", hint="draw it")
            objects.add(number, BOX, "x")
    found = objects.finish()
    assert found.labels.tolist() == [0, 2]
    (damage,) = found.damaged
    assert (damage.reason, damage.message, damage.label) == ("no box", "object 1", 1)
    with pytest.raises(SampleError, match="object 1") as caught:
        check(found, height=HEIGHT, width=WIDTH, classes=3, where="x")
    assert caught.value.of_object


def test_an_object_without_a_mask_is_damaged_where_others_have_one() -> None:
    objects = ObjectList(Canvas(HEIGHT, WIDTH), with_masks=True)
    with objects.one():
        objects.add(0, BOX, "x")
    assert [damage.reason for damage in objects.finish().damaged] == ["missing mask"]
