"""Converts image bytes to pixels, the only conversion in the project; and makes keys of samples.

In: bytes. Out: upright uint8 tensors. Must not know where the bytes are stored, Ray, MLflow or
WebDataset. Training and prediction decode and resize with the same functions, and nothing here
executes or unpickles what it reads.

The conversion:

- JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, JPEG 2000, HEIF and AVIF are read, recognised by their first
  bytes and not by the name (`image_formats`). Everything else is refused. Of several frames the
  first is read. ICC profiles are ignored.
- EXIF orientation is applied. An unreadable EXIF block counts as no orientation.
- Transparency (RGBA, LA, palette or colour key) is blended with white.
- Grey of more than 8 bits is scaled to 8 bits by the rule in `pixel_values`: 0..65535 to 0..255,
  rounded, unless the file or the user says otherwise. Float pixels are refused without a range.
- 1-bit pixels become 0 and 255. Palette, CMYK and YCbCr become RGB.
- For a data set of one channel, RGB becomes grey with the ITU-R 601 weights. For one of three
  channels, grey is repeated.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from models.core.errors import TesseraError
from models.core.family import View
from pipelines.data import image_reading, pixel_values
from pipelines.data.card import MAX_KEY_LENGTH
from pipelines.data.image_formats import PNG_START, SUPPORTED, check_structure, open_lazily, sniff
from pipelines.data.jpeg import FastDecoder
from pipelines.data.pixel_values import Encoding, Highest, encoding_of

Fit = Literal["stretch", "crop", "pad", "resize_crop"]
"""How an image of another size gets the size that the network sees.

"stretch" scales both sides, "crop" cuts out the middle and extends smaller sides by their edge
pixels, "pad" shrinks a larger image without changing its aspect ratio, never enlarges it, and adds
black on the right and at the bottom. "resize_crop" scales the image so that it covers 8/7 of the
height and width, and cuts out the middle: for annotations and predictions without positions.
"""
MIDDLE_SHARE = 7 / 8
"""The share of the shorter side that "resize_crop" keeps, as usual for ImageNet: 224 of 256."""
Size = tuple[int, int]
"""Height and width in pixels."""
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
_Convert = Callable[[Image.Image, Encoding, str], Image.Image]
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})


def make_key(path: str | bytes) -> str:
    """Makes a key from a relative path without its extension; `urllib.parse.unquote` reverts it.

    Everything but ASCII letters, digits and `_ - ~ /` becomes %XX, so a key has no dot (where
    WebDataset would split it), no space and no control character. A key that is too long for a tar
    name is cut and ends in a hash of the path; that can't be reverted.
    """
    raw = os.fsencode(path)
    key = "/".join(quote(part, safe="").replace(".", "%2E") for part in raw.split(b"/") if part)
    if len(key) <= MAX_KEY_LENGTH:
        return key
    import hashlib

    digest = hashlib.sha256(raw).hexdigest()[:16]
    return f"{key[: MAX_KEY_LENGTH - len(digest) - 1]}~{digest}"


def open_image(data: bytes, where: str, frame: int = 0) -> Image.Image:
    """Decodes to an upright image of mode L (grey) or RGB. `where` names the image in errors;
    `frame` is that of an animation, or a page. Raises TesseraError as `decode_image` does."""
    return _decode(data, where, _convert, frame)


def open_shrunk(data: bytes, where: str, shrink: Callable[[Size], int]) -> tuple[Image.Image, Size]:
    """Decodes as `open_image` does, and returns the upright image's own size, too. If that is a
    JPEG, it is decoded at 1/`shrink(size)` of this size, or whole: `shrink` returns 1, 2, 4 or
    8."""
    sizes: list[Size] = []

    def draft(image: Image.Image, form: str) -> None:
        (width, height), orientation = image.size, _orientation(image)
        sizes.append((width, height) if orientation in _SIDEWAYS else (height, width))
        factor = shrink(sizes[0]) if form == "JPEG" else 1
        # Only the last row and column of a shrunk image may stand for fewer pixels than the others.
        # A turned image would have them first.
        if orientation not in (0, 1) and (width % factor or height % factor):
            factor = 1
        if factor > 1:
            image.draft(None, (width // factor, height // factor))

    return _decode(data, where, _convert, begin=draft), sizes[0]


def open_unconverted(data: bytes, where: str) -> Image.Image:
    """Decodes to an upright image with the mode and the values of the file. Raises TesseraError as
    `decode_image` does."""
    return _decode(data, where, lambda image, encoding, where: image)


def undeclared_maximum(data: bytes, where: str) -> Highest | None:
    """The highest value of an image of more than 8 bits whose file doesn't say what its highest
    value can be; None for other images. Raises TesseraError as `decode_image` does."""
    found: list[Highest | None] = []

    def note(image: Image.Image, encoding: Encoding, where: str) -> Image.Image:
        found.append(pixel_values.undeclared_maximum(image, encoding))
        return image

    _decode(data, where, note)
    return found[0]


def check_not_dark(data: bytes, where: str) -> None:
    """Raises TesseraError for an image of 16 or 32 bits that has the values of 12 or fewer, if no
    range is given: it would be nearly black."""
    wide = data[:8] == PNG_START and data[24:25] == b"\x10"
    if image_reading.current().range is not None or not (wide or sniff(data) == "TIFF"):
        return
    highest = undeclared_maximum(data, where)
    if highest and highest.dark:
        raise TesseraError(
            f"{where} has 16 or 32 bits and no value above {highest.value:,}: it would be nearly "
            "black",
            hint=highest.hint(),
        )


def _decode(
    data: bytes,
    where: str,
    convert: _Convert,
    frame: int = 0,
    begin: Callable[[Image.Image, str], None] | None = None,
) -> Image.Image:
    form = sniff(data)
    if form is None:
        problem = "is empty" if not data else f"begins with {bytes(data[:8])!r}"
        raise TesseraError(
            f"{where} is not an image of a supported format: it {problem}",
            hint=f"{SUPPORTED} are supported, recognised by content",
        )
    check_structure(data, form, where)
    _configure_pillow()
    try:
        with open_lazily(data, form) as image:
            if frame:
                image.seek(frame)
            _check_size(image.size, where)
            if begin is not None:
                begin(image, form)
            image.load()
            encoding = encoding_of(image, data, where)
            return convert(_turn_upright(image), encoding, where)
    except TesseraError:
        raise
    except MemoryError:
        raise TesseraError(f"{where} can't be decoded: not enough memory") from None
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Pillow prints the buffer's address, which would make two reports of the same damage
        # differ.
        reason = re.sub(r"<[^>]*>", "the bytes", reason)
        reason = reason.removeprefix("cannot identify image file the bytes") or "it is damaged"
        raise TesseraError(f"{where} can't be decoded as {form}: {reason}") from None


def decode_image(data: bytes, channels: int, *, where: str = "image") -> Tensor:
    """Decodes to uint8 (C, H, W) by the conversion described above. `channels` is 1 or 3.

    Raises TesseraError, which begins with `where`, for damaged bytes, for a format that is not
    read, and for more pixels than `ImageReading.max_pixels`, which is checked before decoding.
    """
    image = None
    if channels in (1, 3):
        image = FastDecoder(channels, image_reading.current().max_pixels)(memoryview(data))
    return image if image is not None else to_tensor(open_image(data, where), channels)


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Converts an image of mode L or RGB to uint8 (C, H, W)."""
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise TesseraError(f"{channels} is not a valid number of channels", hint="use 1 or 3")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    if channels == 1:
        return torch.from_numpy(pixels)[None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, height, width), bilinear with antialiasing.

    The aspect ratio is not preserved. An image of that size is returned unchanged.
    """
    if image.shape[-2:] == (height, width):
        return image
    return functional.interpolate(
        image[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]


def crop(image: Tensor, height: int, width: int, *, outside: int | None = None) -> Tensor:
    """(…, H, W) -> (…, height, width): the middle of the image, without scaling.

    A smaller image is extended by its edge pixels, or by the value `outside`.
    """
    for axis, size in ((-2, height), (-1, width)):
        current = image.shape[axis]
        if current > size:
            image = image.narrow(axis, (current - size) // 2, size)
        elif current < size and outside is None:
            source = torch.arange(size) - (size - current) // 2
            image = image.index_select(axis, source.clamp(0, current - 1))
        elif current < size:
            shape = list(image.shape)
            shape[axis] = size
            frame = image.new_full(shape, int(outside or 0))
            frame.narrow(axis, (size - current) // 2, current).copy_(image)
            image = frame
    return image


def fit_image(image: Tensor, height: int, width: int, fit: Fit) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, height, width), for training and prediction alike."""
    if fit == "crop":
        return crop(image, height, width)
    size = (image.shape[-2], image.shape[-1])
    if fit == "resize_crop":
        return crop(resize(image, *size_before_crop(size, height, width)), height, width)
    if fit == "pad":
        (inner,) = extents(torch.tensor([size]), height, width, fit).tolist()
        frame = image.new_zeros((image.shape[0], height, width))
        frame[:, : inner[0], : inner[1]] = resize(image, *inner)
        return frame
    return resize(image, height, width)


def extents(sizes: Tensor, height: int, width: int, fit: Fit) -> Tensor:
    """Heights and widths, int64 (B, 2), of images inside their fitted frames, from the upper left
    corner. `sizes`, int64 (B, 2), are those before `fit_image`."""
    frame = torch.tensor([height, width])
    if fit != "pad":
        return frame.expand(len(sizes), 2).clone()
    scale = (frame / sizes.double()).amin(1, keepdim=True).clamp(max=1)
    return (sizes * scale).round().long().clamp(min=1).minimum(frame)


def size_before_crop(size: Size, height: int, width: int) -> Size:
    """The size to which "resize_crop" resizes an image of `size`, before it takes the middle."""
    scale = max(height / size[0], width / size[1]) / MIDDLE_SHARE
    return max(round(size[0] * scale), height), max(round(size[1] * scale), width)


def view(size: tuple[int, int], height: int, width: int, fit: Fit) -> View:
    """Where `fit_image` moves the pixels of an image of size (height, width)."""
    frame = (height, width)
    if fit in ("crop", "resize_crop"):
        inner = size if fit == "crop" else size_before_crop(size, height, width)
        down, right = (
            -((side - to) // 2) if side > to else (to - side) // 2 for side, to in zip(inner, frame)
        )
        scale = (inner[0] / size[0], inner[1] / size[1])
        return View(size, frame, scale=scale, shift=(down, right))
    (inner,) = extents(torch.tensor([size]), height, width, fit).tolist()
    return View(size, frame, scale=(inner[0] / size[0], inner[1] / size[1]))


def encode_png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Encodes uint8 (H, W) or (H, W, 3) as PNG. Equal pixels give equal bytes. Raises TesseraError
    for another type or shape."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise TesseraError(f"an array of {pixels.dtype} {pixels.shape} is not a uint8 image")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    limit = image_reading.current().max_pixels
    if width * height > limit:
        raise TesseraError(
            f"{where} has {width} by {height} pixels, more than {limit:,}",
            hint=f"reduce its size, or allow it: --option max_pixels={width * height}",
        )
    if not width or not height:
        raise TesseraError(f"{where} has no pixels: {width} by {height}")


def _turn_upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _orientation(image) not in (0, 1) else image


def _orientation(image: Image.Image) -> Any:
    """The value in the EXIF block; 1 is upright."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an unreadable EXIF block does not make the image unreadable
        return 1


def _convert(image: Image.Image, encoding: Encoding, where: str) -> Image.Image:
    given = image_reading.current().range
    if encoding.colour and given not in (None, (0, pixel_values.LARGEST)):
        raise TesseraError(
            f"{where} has colours of 16 bits, which are read with the range "
            f"0..{pixel_values.LARGEST:,} only",
            hint="convert it to 8 bits, or to grey",
        )
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode in pixel_values.WIDE_MODES:
        return pixel_values.to_8_bits(image, encoding, image_reading.current(), where)
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        # Pillow applies a colour key only when it converts to RGBA.
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", foreground.size, "white")
        return Image.alpha_composite(background, foreground).convert("L" if grey else "RGB")
    return image.convert("L" if grey else "RGB")


def _configure_pillow() -> None:
    """Ignores Pillow's warnings about metadata, and its limit of size: what matters is an error
    here.

    This adds a filter. `catch_warnings` is not thread-safe: threads that decode at the same time
    would restore each other's filters.
    """
    Image.MAX_IMAGE_PIXELS = None
    rule = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if rule not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
