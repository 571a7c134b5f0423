"""The pixels of a mask file, whatever its format says about them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from layouts.base import picture
from layouts.pixels import mask, regions
from PIL import Image

from pipelines.data.importers.support.mask_files import (
    looks_like_mask,
    read_mask,
    read_soft_mask,
)
from pipelines.data.sample_error import SampleError


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def test_a_palette_comes_with_its_colours(tmp_path) -> None:
    path = mask(tmp_path / "x.png", regions(0, 3), palette=[(0, 0, 0), (255, 0, 0), (7, 7, 7)])
    raw = read_mask(path.read_bytes(), "x")
    np.testing.assert_array_equal(raw.pixels, regions(0, 3))
    assert raw.palette is not None
    assert raw.palette[:3] == (0, 0xFF0000, 0x070707)
    assert np.unique(raw.resolved().pixels).tolist() == [0, 0x070707, 0xFF0000]


def test_a_palette_of_greys_resolves_to_values(tmp_path) -> None:
    path = mask(tmp_path / "x.png", regions(0, 3), palette=[(0,) * 3, (128,) * 3, (255,) * 3])
    raw = read_mask(path.read_bytes(), "x").resolved()
    assert (raw.colours, np.unique(raw.pixels).tolist()) == (False, [0, 128, 255])


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF"])
def test_lossy_masks_are_refused_and_a_threshold_reads_them(form: str) -> None:
    true = regions(0, 2) * np.uint8(255)
    data = encoded(Image.fromarray(true).convert("RGB"), form)
    with pytest.raises(SampleError, match=rf"x is a {form} file.*--option threshold=128"):
        read_mask(data, "x")
    assert (read_soft_mask(data, "x", 128).pixels == true).mean() > 0.95
    assert looks_like_mask(data, "x")


def test_a_mask_in_the_transparency_is_refused() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    read_mask(encoded(image), "x")  # the control: a mask of one class
    image.putpixel((3, 3), (255, 0, 0, 0))
    with pytest.raises(SampleError, match="its mask in the transparency"):
        read_mask(encoded(image), "x")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_photo_does_not_look_like_a_mask(tmp_path, suffix: str) -> None:
    path = picture(tmp_path / f"x{suffix}", width=64, height=48)
    assert not looks_like_mask(path.read_bytes(), "x")


@pytest.mark.parametrize("form", ["TIFF", "GIF"])
def test_a_mask_of_several_pages_is_refused(form: str) -> None:
    """Otherwise the classes on the others would be lost without a message."""
    pages = [Image.fromarray(np.full((8, 6), value, np.uint8)) for value in (0, 90)]
    for more in ([], pages[1:]):
        out = io.BytesIO()
        pages[0].save(out, format=form, save_all=True, append_images=more)
        if more:
            with pytest.raises(SampleError, match="x has 2 pages, and a mask has one"):
                read_mask(out.getvalue(), "x")
        else:
            assert not read_mask(out.getvalue(), "x").pixels.any()  # the control
