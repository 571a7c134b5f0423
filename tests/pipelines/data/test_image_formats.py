"""Each format is recognised by its first bytes, read completely or refused as damaged."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import image_formats, images
from pipelines.data.sources import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, is_image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "HEIF", "AVIF")


def photo(height: int = 24, width: int = 40) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 90], -1)
    return Image.fromarray(ramp.astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    if form == "HEIF":
        import pillow_heif

        pillow_heif.from_pillow(image).save(out, **options)
    else:
        image.save(out, format=form, **options)
    return out.getvalue()


@pytest.fixture(autouse=True)
def plugins_as_before() -> Iterator[None]:
    """Opening a HEIF file registers a plugin with Pillow; other tests must not depend on it."""
    yield
    image_formats._register_heif.cache_clear()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_recognised_and_decoded(form: str) -> None:
    data = encoded(photo(), form)
    assert image_formats.sniff(data) == form
    got = images.decode_image(data, 3).float()
    true = torch.from_numpy(np.array(photo())).permute(2, 0, 1).float()
    assert got.shape == true.shape
    assert (got - true).abs().mean() < 25  # a GIF has 256 colours
    assert images.decode_image(data, 1).shape == (1, 24, 40)


@pytest.mark.parametrize("form", ["PPM", "JPEG2000"])
def test_lossless_formats_have_identical_pixels(form: str) -> None:
    got = images.decode_image(encoded(photo(), form), 3)
    assert torch.equal(got, torch.from_numpy(np.array(photo())).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        (b"P1 2 2\n1 0 0 1", [0, 255, 255, 0]),
        (b"P2\n# made by hand\n2 2 255\n1 2 3 4", [1, 2, 3, 4]),
        (b"P4\n2 2\n\x80\x40", [0, 255, 255, 0]),
        (b"P5 2 2 15\n\0\5\x0a\x0f", [0, 85, 170, 255]),
        (b"P5 2 2 4095\n" + struct.pack(">4H", 0, 1365, 2730, 4095), [0, 85, 170, 255]),
    ],
    ids=["plain bitmap", "plain grey", "bitmap", "4 bits", "12 bits"],
)
def test_a_ppm_is_scaled_by_its_highest_value(text: bytes, pixels: list[int]) -> None:
    assert images.decode_image(text, 1).flatten().tolist() == pixels


@pytest.mark.fault(21)
@pytest.mark.parametrize("form", ["PPM", "JPEG2000", "HEIF", "AVIF"])
def test_truncated_images_are_refused(form: str) -> None:
    """Truncated at each twentieth, and by one or two bytes. A PPM may end in a line break."""
    data = encoded(photo(), form)
    ends = {len(data) * percent // 100 for percent in range(0, 100, 5)}
    for end in ends | {len(data) - 1, len(data) - 2}:
        with pytest.raises(TesseraError):
            images.decode_image(data[:end], 3)


@pytest.mark.fault(25)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("tail", [b"\0" * 5, b"PK\5\6" + b"\0" * 18], ids=["zeros", "zip"])
def test_bytes_after_the_end_are_passed_over(form: str, tail: bytes) -> None:
    """All decoders agree on the pixels."""
    data = encoded(photo(), form)
    assert torch.equal(images.decode_image(data + tail, 3), images.decode_image(data, 3))


@pytest.mark.fault(21)
def test_a_gif_without_its_end_is_refused_wherever_a_semicolon_follows() -> None:
    data = encoded(photo(), "GIF")
    with pytest.raises(TesseraError, match="damaged GIF: its end is missing"):
        images.decode_image(data[:-1], 3)
    with pytest.raises(TesseraError, match="damaged GIF"):
        images.decode_image(data[:-3] + b"\xff;", 3)
    Image.open(io.BytesIO(data[:-1])).load()  # the control: Pillow alone accepts it


@pytest.mark.parametrize(
    ("brands", "form"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIF"),
        (b"mif1\0\0\0\0heic", "HEIF"),
        (b"mif1\0\0\0\0avifmiaf", "AVIF"),
        (b"avis\0\0\0\0msf1", "AVIF"),
        (b"isom\0\0\0\0mp42", None),
    ],
)
def test_brands_tell_heif_avif_and_video_apart(brands: bytes, form: str | None) -> None:
    box = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands
    assert image_formats.sniff(box + bytes(50)) == form


def test_a_heic_without_pixels_is_damaged_and_says_so() -> None:
    with pytest.raises(TesseraError, match=r"^IMG_1 can't be decoded as HEIF: "):
        images.decode_image(b"\0\0\0\x24ftypheic" + bytes(100), 3, where="IMG_1")


def test_an_image_is_known_by_its_suffix_in_any_case() -> None:
    assert not IMAGE_SUFFIXES & UNREAD_IMAGE_SUFFIXES
    assert all(is_image(f"a/b{suffix.upper()}") for suffix in IMAGE_SUFFIXES)
    assert not any(is_image(f"b{suffix}") for suffix in UNREAD_IMAGE_SUFFIXES)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_frames_are_counted(form: str) -> None:
    frames = [photo().transpose(Image.Transpose(number)) for number in (0, 1, 3)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert image_formats.list_frames(data) == [0, 1, 2]
    assert image_formats.list_frames(encoded(frames[0], form)) == [0]
    assert image_formats.list_frames(data[: len(data) // 3])[0] == 0  # whatever is left of it
    second = np.asarray(images.open_image(data, "x", 1)).astype(int)
    assert np.abs(second - np.asarray(frames[1])).mean() < 25
    assert np.abs(second - np.asarray(frames[0])).mean() > 25  # the control


def test_thumbnails_in_a_tiff_are_no_pages() -> None:
    out = io.BytesIO()
    pages = [photo(), photo(6, 10), photo(12, 20)]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    assert image_formats.list_frames(out.getvalue()) == [0, 2]
