"""The one way from image bytes to pixels, and the keys of samples.

In: bytes. Out: upright uint8 tensors. Must not know where the
bytes lie, nor Ray, MLflow or WebDataset. Training and prediction decode and resize with the same
functions, and nothing here ever executes or unpickles what it reads.

The one conversion, whatever the file:

- JPEG, PNG, WEBP, BMP, GIF and TIFF, told by their first bytes and not by their name; everything
  else is refused. Of several frames the first counts. ICC profiles are ignored.
- EXIF orientation is applied; an EXIF block that can't be read is no orientation.
- Transparency (RGBA, LA, palette or colour key) is laid on white.
- 16-bit grey is scaled to 8 bits (0..65535 to 0..255, rounded); float pixels are refused, because
  nothing says which range they have.
- 1-bit becomes 0 and 255; palette, CMYK, YCbCr become RGB.
- RGB for a data set of one channel becomes grey with the ITU-R 601 weights; grey for one of three
  channels is repeated.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from models.core.errors import TesseraError
from models.core.family import View
from pipelines.data.card import MAX_KEY_LENGTH, MAX_PIXELS
from pipelines.data.jpeg import MAX_SCANS, SCAN, FastDecoder

Fit = Literal["stretch", "crop", "pad"]
"""How an image of another size gets the size that the network sees: both sides scaled; the middle of
it cut out, with smaller sides continued by the edge; or made smaller in its own shape where it is
too large, never larger, with black to the right and below."""
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})


def make_key(path: str | bytes) -> str:
    """A key from a relative path without its extension; `urllib.parse.unquote` gives it back.

    Everything but ASCII letters, digits and `_ - ~ /` is written as %XX, so a key has no dot (where
    WebDataset would cut it), no space and no control character. A longer one than a tar name takes
    is cut and ends in a hash of the whole.
    """
    raw = os.fsencode(path)
    key = "/".join(quote(part, safe="").replace(".", "%2E") for part in raw.split(b"/") if part)
    if len(key) <= MAX_KEY_LENGTH:
        return key
    import hashlib

    mark = hashlib.sha256(raw).hexdigest()[:16]
    return f"{key[: MAX_KEY_LENGTH - len(mark) - 1]}~{mark}"


def sniff(data: bytes) -> str | None:
    """The format by its first bytes, as Pillow names it; None for everything that is refused."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == _PNG:
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return None


def open_image(data: bytes, where: str) -> Image.Image:
    """Decodes to an upright image of mode L (grey) or RGB. `where` names the image in errors."""
    form = sniff(data)
    if form is None:
        what = "is empty" if not data else f"begins with {bytes(data[:8])!r}"
        raise TesseraError(
            f"{where} is no image that is read here: it {what}",
            hint="JPEG, PNG, WEBP, BMP, GIF and TIFF are read, told by content",
        )
    if form == "PNG":
        _check_png(data, where)
    if form == "JPEG" and data.count(SCAN) > MAX_SCANS:
        raise TesseraError(f"{where} is a JPEG of more than {MAX_SCANS} scans, which is refused")
    if form == "GIF" and data[-1:] != b";":  # Pillow stops reading at the end of the pixels
        raise TesseraError(f"{where} is a damaged GIF: its end is missing")
    _hush_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as image:
            _check_size(image.size, where)
            image.load()
            return _convert(_turn_upright(image), where)
    except TesseraError:
        raise
    except MemoryError:
        raise TesseraError(f"{where} can't be decoded: not enough memory") from None
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # The address of a buffer would make two reports of the same damage differ.
        reason = re.sub(r"<[^>]*>", "the bytes", reason)
        raise TesseraError(f"{where} can't be decoded as {form}: {reason}") from None


def decode_image(data: bytes, channels: int, *, where: str = "image") -> Tensor:
    """uint8 (C, H, W) by the conversion on top of this file; `channels` is 1 or 3.

    Raises TesseraError with `where` for damaged bytes, a refused format, or more pixels than
    `MAX_PIXELS`, which is checked before a pixel is decoded.
    """
    image = None
    if channels in (1, 3):
        image = FastDecoder(channels, MAX_PIXELS)(memoryview(data))
    return image if image is not None else to_tensor(open_image(data, where), channels)


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """uint8 (C, H, W) from an image of mode L or RGB."""
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None:
        raise TesseraError(f"images of {channels} channels can't be made", hint="1 or 3 can")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    if channels == 1:
        return torch.from_numpy(pixels)[None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, height, width), bilinear with antialias, both sides scaled.

    The aspect ratio is not kept. An image of that size comes back as it is.
    """
    if image.shape[-2:] == (height, width):
        return image
    return functional.interpolate(
        image[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )[0]


def crop(image: Tensor, height: int, width: int, *, outside: int | None = None) -> Tensor:
    """(…, H, W) -> (…, height, width): the middle of it, no pixel scaled.

    Where the image is smaller it is continued by its edge, or filled with `outside`.
    """
    for axis, size in ((-2, height), (-1, width)):
        given = image.shape[axis]
        if given > size:
            image = image.narrow(axis, (given - size) // 2, size)
        elif given < size and outside is None:
            at = torch.arange(size) - (size - given) // 2
            image = image.index_select(axis, at.clamp(0, given - 1))
        elif given < size:
            shape = list(image.shape)
            shape[axis] = size
            whole = image.new_full(shape, int(outside or 0))
            whole.narrow(axis, (size - given) // 2, given).copy_(image)
            image = whole
    return image


def fit_image(image: Tensor, height: int, width: int, fit: Fit) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, height, width), the one way of training and prediction."""
    if fit == "crop":
        return crop(image, height, width)
    if fit == "pad":
        given = (image.shape[-2], image.shape[-1])
        (inner,) = extents(torch.tensor([given]), height, width, fit).tolist()
        whole = image.new_zeros((image.shape[0], height, width))
        whole[:, : inner[0], : inner[1]] = resize(image, *inner)
        return whole
    return resize(image, height, width)


def extents(sizes: Tensor, height: int, width: int, fit: Fit) -> Tensor:
    """int64 (B, 2): how much of the fitted images, from the left upper corner, is picture, for
    images that were `sizes` (B, 2)."""
    frame = torch.tensor([height, width])
    if fit != "pad":
        return frame.expand(len(sizes), 2).clone()
    scale = (frame / sizes.double()).amin(1, keepdim=True).clamp(max=1)
    return (sizes * scale).round().long().clamp(min=1).minimum(frame)


def view(size: tuple[int, int], height: int, width: int, fit: Fit) -> View:
    """Where the pixels of an image of that size are after `fit_image`."""
    frame = (height, width)
    if fit == "crop":
        down, right = (
            -((given - to) // 2) if given > to else (to - given) // 2
            for given, to in zip(size, frame)
        )
        return View(size, frame, shift=(down, right))
    (inner,) = extents(torch.tensor([size]), height, width, fit).tolist()
    return View(size, frame, scale=(inner[0] / size[0], inner[1] / size[1]))


def encode_png(pixels: np.ndarray[Any, Any]) -> bytes:
    """PNG bytes of uint8 (H, W) or (H, W, 3). The same pixels give the same bytes."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise TesseraError(f"pixels of {pixels.dtype} {pixels.shape} are no uint8 image")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def _check_png(data: bytes, where: str) -> None:
    """Every chunk whole, and nothing after the last: Pillow takes a PNG whose end is cut off."""
    at, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        given = int.from_bytes(data[end - 4 : end], "big")
        if end > len(data) or zlib.crc32(memoryview(data)[at + 4 : end - 4]) != given:
            raise TesseraError(f"{where} is a damaged PNG: its chunk {kind!r} is not whole")
        at = end
    if at != len(data):
        raise TesseraError(f"{where} is a damaged PNG: {len(data) - at} bytes follow its end")


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise TesseraError(
            f"{where} has {width} by {height} pixels, more than {MAX_PIXELS:,}",
            hint="shrink it before packing",
        )
    if not width or not height:
        raise TesseraError(f"{where} has no pixels: {width} by {height}")


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # a broken EXIF block is not a broken image
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _convert(image: Image.Image, where: str) -> Image.Image:
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode == "F":
        raise TesseraError(
            f"{where} has float pixels, whose range nothing tells",
            hint="convert it to 8 or 16 bits",
        )
    if image.mode.startswith("I"):
        return _narrow(image, where)
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        # Pillow knows a colour key on its way to RGBA only.
        over = image.convert("RGBA")
        paper = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(paper, over).convert("L" if grey else "RGB")
    return image.convert("L" if grey else "RGB")


def _narrow(image: Image.Image, where: str) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise TesseraError(
            f"{where} has whole-number pixels outside 0 to 65535",
            hint="convert it to 8 or 16 bits",
        )
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def _hush_pillow() -> None:
    """Pillow warns of sizes and odd metadata; what matters of it is an error here.

    A filter and not `catch_warnings`, which threads that decode at once would undo for each other.
    """
    rule = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if rule not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
