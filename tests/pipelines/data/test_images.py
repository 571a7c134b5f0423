"""Every supported kind of image has one conversion to pixels; all others are errors."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import images
from pipelines.data.card import MAX_KEY_LENGTH, check_key

WHITE, BLACK = 255, 0


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def photo(height: int = 24, width: int = 40) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 90], -1)
    return Image.fromarray(ramp.astype(np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a large image, with almost no data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_have_identical_pixels(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    got = images.decode_image(encoded(photo(), form, **options), 3)
    assert got.dtype == torch.uint8
    assert torch.equal(got, torch.from_numpy(np.array(photo())).permute(2, 0, 1))


def test_jpeg_is_close_and_of_a_gif_the_first_frame_is_read() -> None:
    true = torch.from_numpy(np.array(photo())).permute(2, 0, 1).float()
    got = images.decode_image(encoded(photo(), "JPEG", quality=95), 3).float()
    assert (got - true).abs().mean() < 4
    black, white = Image.new("P", (5, 4), 0), Image.new("P", (5, 4), 1)
    for frame in (black, white):
        frame.putpalette([0, 0, 0, 255, 255, 255])
    two = encoded(black, "GIF", save_all=True, append_images=[white])
    assert images.decode_image(two, 1).unique().tolist() == [BLACK]


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("1", (3, 2), 1), WHITE),
        (Image.new("L", (3, 2), 77), 77),
        (Image.new("LA", (3, 2), (0, 0)), WHITE),
        (Image.new("LA", (3, 2), (40, 255)), 40),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (3, 2), (0, 0, 0, 128)), 127),
        (Image.new("I;16", (3, 2), 65535), WHITE),
        (Image.new("I;16", (3, 2), 257 * 9), 9),
    ],
    ids=["1-bit", "grey", "LA clear", "LA solid", "RGBA clear", "RGBA half", "16 white", "16 dark"],
)
def test_every_mode_has_one_conversion(image: Image.Image, grey: int) -> None:
    data = encoded(image)
    one, three = images.decode_image(data, 1), images.decode_image(data, 3)
    assert one.shape == (1, 2, 3)
    assert three.shape == (3, 2, 3)
    assert one.unique().tolist() == [grey]
    assert three.unique().tolist() == [grey]


@pytest.mark.fault(24)
def test_palette_colour_key_and_cmyk() -> None:
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    assert images.decode_image(encoded(palette), 3)[:, 0, 0].tolist() == [200, 10, 20]
    clear = images.decode_image(encoded(palette, transparency=1), 3)
    assert clear.unique().tolist() == [WHITE]
    keyed = images.decode_image(encoded(Image.new("L", (3, 2), 7), transparency=7), 1)
    assert keyed.unique().tolist() == [WHITE]
    cmyk = images.decode_image(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), 3)
    assert cmyk.unique().tolist() == [WHITE]


def test_two_channels_are_refused() -> None:
    with pytest.raises(TesseraError, match="2 is not a valid number of channels"):
        images.decode_image(encoded(photo()), 2)


@pytest.mark.fault(24)
def test_float_pixels_are_refused() -> None:
    with pytest.raises(TesseraError, match=r"^scan has float pixels"):
        images.decode_image(encoded(Image.new("F", (3, 2), 0.5), "TIFF"), 1, where="scan")


@pytest.mark.fault(23)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_upright_by_exif(orientation: int) -> None:
    upright = np.array(photo())
    stored = {  # how a camera stores the upright image for each orientation
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    got = images.decode_image(data, 3).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, upright)


def test_an_unreadable_exif_block_is_ignored() -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x01" * 40)
    assert images.decode_image(data, 3).shape == (3, 24, 40)


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x18ftypisom",
        b"P7\nWIDTH 2\n" + b"\0" * 12,
        b"\x80\x04\x95",
    ],
    ids=["empty", "html", "eps", "pdf", "svg", "mp4", "pam", "pickle"],
)
def test_other_formats_are_refused_by_content(data: bytes) -> None:
    with pytest.raises(TesseraError, match=r"^cat\.jpg is not an image of a supported format"):
        images.decode_image(data, 3, where="cat.jpg")


@pytest.mark.control(25)
def test_pillow_alone_opens_eps() -> None:
    """Control: Pillow goes by content and accepts it under any name."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"


@pytest.mark.fault(22)
@pytest.mark.parametrize("size", [(13_000, 13_000), (19_000, 19_000), (100_001, 1_000)])
def test_too_many_pixels_are_refused_from_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(TesseraError, match="pixels"):
        images.decode_image(png_header(*size), 1)


@pytest.mark.fault(20)
def test_every_flipped_bit_of_a_png_is_refused() -> None:
    """Some crash torchvision's decoder, and Pillow accepts some."""
    data = encoded(photo(8, 8))
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TesseraError):
            images.decode_image(bytes(flipped), 3)


@pytest.mark.fault(21)
@pytest.mark.control(21)
def test_a_png_truncated_anywhere_is_refused() -> None:
    data = encoded(photo(8, 8))
    for end in range(len(data)):
        with pytest.raises(TesseraError):
            images.decode_image(data[:end], 3)
    Image.open(io.BytesIO(data[:-12])).load()  # the control: bare Pillow accepts it


@pytest.mark.fault(21)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_images_are_refused(form: str) -> None:
    """Truncated at each hundredth, and by one or two bytes."""
    data = encoded(photo(), form)
    assert images.decode_image(data, 3).shape == (3, 24, 40)  # the control
    ends = {len(data) * percent // 100 for percent in range(100)}
    for end in ends | {len(data) - 1, len(data) - 2}:
        with pytest.raises(TesseraError):
            images.decode_image(data[:end], 3)


@pytest.mark.parametrize(("height", "width"), [(11, 7), (4, 3), (20, 16), (5, 30), (24, 2)])
def test_a_crop_is_centred_and_extends_the_edge(height: int, width: int) -> None:
    """Compared with NumPy's padding."""
    image = torch.arange(11 * 7, dtype=torch.uint8).view(1, 11, 7)
    got = images.fit_image(image, height, width, "crop")
    wide = np.pad(image[0].numpy(), ((30, 30), (30, 30)), mode="edge")
    top = 30 + ((11 - height) // 2 if height < 11 else -((height - 11) // 2))
    left = 30 + ((7 - width) // 2 if width < 7 else -((width - 7) // 2))
    np.testing.assert_array_equal(got[0].numpy(), wide[top : top + height, left : left + width])
    filled = images.crop(image, height, width, outside=255)
    assert ((filled == 255).sum() > 0) == (height > 11 or width > 7)
    inside = filled != 255
    assert torch.equal(filled[inside], got[inside])
    assert images.fit_image(image, height, width, "stretch").shape == (1, height, width)


@pytest.mark.parametrize("size", [(348, 464), (224, 224), (1000, 230), (30, 50), (256, 256)])
@pytest.mark.parametrize("to", [(224, 224), (96, 160)])
def test_the_middle_is_that_of_torchvisions_evaluation(
    size: tuple[int, int], to: tuple[int, int]
) -> None:
    """`Resize(256)` and `CenterCrop(224)`. The middle may lie a pixel beside theirs, where a side
    is odd, so the images are smooth."""
    from torchvision.transforms.v2 import functional

    rows, columns = (torch.linspace(0, 3, side) for side in size)
    image = (120 + 100 * (rows[:, None] + columns).sin()).expand(3, -1, -1).round().byte()
    got = images.fit_image(image, *to, "resize_crop")
    scale = max(to[0] / size[0], to[1] / size[1]) * 8 / 7
    inner = [round(side * scale) for side in size]
    assert min(a / b for a, b in zip(inner, to)) == pytest.approx(8 / 7, rel=0.01)
    expected = functional.center_crop(functional.resize(image, inner, antialias=True), list(to))
    assert (got.int() - expected.int()).abs().max() <= 6
    stretched = images.fit_image(image, *to, "stretch")  # the control
    assert (stretched.int() - expected.int()).abs().max() > 12
    assert images.extents(torch.tensor([size]), *to, "resize_crop").tolist() == [list(to)]
    where = images.view(size, *to, "resize_crop")
    row, column = to[0] // 2, to[1] // 2
    source = [(p - s) / f for p, s, f in zip((row, column), where.shift, where.scale)]
    near = int(image[0, round(source[0]), round(source[1])])
    assert int(got[0, row, column]) == pytest.approx(near, abs=12)


@pytest.mark.fault(22)
@pytest.mark.control(22)
def test_pillows_warnings_are_ignored_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of 9,500 x 9,500 makes Pillow warn; here it raises an error without a warning."""
    data = png_header(9_500, 9_500)
    pillows_own = 1024 * 1024 * 1024 // 4 // 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_own)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    caught: list[BaseException] = []

    def work() -> None:
        for _ in range(5):
            try:
                images.decode_image(data, 1)
            except BaseException as error:
                caught.append(error)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not seen
    assert len(caught) == 15
    assert {type(error) for error in caught} == {TesseraError}


def test_resize_keeps_a_uniform_image_uniform() -> None:
    flat = torch.full((3, 11, 7), 93, dtype=torch.uint8)
    out = images.resize(flat, 32, 16)
    assert out.shape == (3, 32, 16)
    assert out.dtype == torch.uint8
    assert out.unique().tolist() == [93]
    assert images.resize(flat, 11, 7) is flat


def test_resize_shrinks_with_antialias() -> None:
    """A fine checkerboard shrinks to grey; without antialias it would stay black or white."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = images.resize(board.to(torch.uint8)[None], 8, 8)
    assert (small.float() - 127.5).abs().max() < 12


def test_png_round_trip() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    data = images.encode_png(grey)
    assert data == images.encode_png(grey)
    np.testing.assert_array_equal(images.decode_image(data, 1)[0].numpy(), grey)
    with pytest.raises(TesseraError, match="not a uint8 image"):
        images.encode_png(grey.astype(np.float32))


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    "path", ["train/cat/0001", "a b/ü.x/1.2", "../../etc/passwd", "/abs/x", "line\nbreak", "-", "~"]
)
def test_a_key_is_safe_and_reversible(path: str) -> None:
    key = images.make_key(path)
    check_key(key, "here")
    assert "." not in key
    assert unquote(key) == path.lstrip("/")


@pytest.mark.fault(10)
def test_long_and_undecodable_paths_have_keys() -> None:
    keys = {images.make_key("x" * 4000 + tail) for tail in "ab"}
    keys.add(images.make_key(b"\xff\xfe"))
    assert len(keys) == 3
    assert all(len(key) <= MAX_KEY_LENGTH for key in keys)


@pytest.mark.fault(10)
@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a.b", "a b", "a\n", "a\0", "é"])
def test_invalid_keys_are_refused(key: str) -> None:
    with pytest.raises(TesseraError, match="is not allowed"):
        check_key(key, "here")
