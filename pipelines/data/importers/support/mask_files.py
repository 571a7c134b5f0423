"""Reads mask files, without giving their pixels a meaning.

In: bytes of an image file whose values or colours are classes. Out: `MaskPixels`. Must not know
where the files are, nor which value is which class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.image_formats import list_frames, sniff
from pipelines.data.images import open_image, open_unconverted
from pipelines.data.sample_error import SampleError

Array = np.ndarray[Any, Any]
LOSSY = ("JPEG", "WEBP", "HEIF", "AVIF")
"""Formats that change values, as they are mostly written."""
_VALUE_MODES = frozenset({"L", "I", "I;16", "I;16B", "I;16L"})
_TO_COLOUR = np.array([1 << 16, 1 << 8, 1])
_NEAR = 24
"""A lossy mask of two values has most of its pixels within this of 0 or of 255."""


@dataclass(frozen=True)
class MaskPixels:
    """A mask as in its file.

    pixels   (H, W) of values, of entries of the palette, or of colours as 0xrrggbb
    colours  whether they are colours
    palette  the colour 0xrrggbb of each entry; None for a file without a palette
    """

    pixels: Array
    colours: bool
    palette: tuple[int, ...] | None = None

    def resolved(self) -> MaskPixels:
        """The mask without a palette: its values if all colours are grey, else its colours."""
        if self.palette is None:
            return self
        table = np.array([*self.palette, *([0] * (256 - len(self.palette)))], np.int64)
        return _values_or_colours(table[self.pixels])


def read_mask(data: bytes, where: str) -> MaskPixels:
    """The pixels of a mask file. Grey in three channels counts as grey. Raises TesseraError."""
    form = sniff(data)
    if form in LOSSY:
        raise SampleError(
            "unreadable mask",
            f"{where} is a {form} file, which doesn't keep values exactly: export the masks as "
            "PNG, or, for masks of two classes, give --option threshold=128",
        )
    if (count := len(list_frames(data))) > 1:
        raise SampleError(
            "unreadable mask",
            f"{where} has {count} pages, and a mask has one",
            hint="save the page with the classes as a file of its own",
        )
    image = open_unconverted(data, where)
    if image.mode == "1":
        return MaskPixels(np.asarray(image, np.uint8) * np.uint8(255), colours=False)
    if image.mode == "P":
        return MaskPixels(np.asarray(image), colours=False, palette=_palette(image))
    if image.mode in _VALUE_MODES:
        return MaskPixels(np.asarray(image), colours=False)
    if image.mode not in ("LA", "RGB", "RGBA"):
        raise SampleError("unreadable mask", f"{where} has pixels of mode {image.mode}")
    if image.mode in ("LA", "RGBA"):
        _check_transparency(np.asarray(image), where)
    if image.mode == "LA":
        return MaskPixels(np.asarray(image)[..., 0], colours=False)
    rgb = np.asarray(image)[..., :3]
    return _values_or_colours(rgb.astype(np.int64) @ _TO_COLOUR)


def read_soft_mask(data: bytes, where: str, threshold: int) -> MaskPixels:
    """The mask as 0 and 255, by whether the brightness of a pixel is at least `threshold`. The file
    may have any format."""
    grey = np.asarray(open_image(data, where).convert("L"))
    return MaskPixels(np.where(grey >= threshold, 255, 0).astype(np.uint8), colours=False)


def turn_upright(pixels: Array, orientation: int) -> Array:
    """(H, W) as it is stored -> upright, by the EXIF orientation of its image, 1 to 8."""
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: pixels.T[::-1, ::-1],
        8: np.rot90(pixels, 1),
    }
    return np.ascontiguousarray(turned.get(orientation, pixels))


def looks_like_mask(data: bytes, where: str) -> bool:
    """Whether an image has few values, as a mask has, rather than those of a photo. Raises
    TesseraError for an image that can't be read."""
    if sniff(data) in LOSSY:
        pixels = np.asarray(open_image(data, where).convert("RGB")).astype(np.int64)
        near = (pixels <= _NEAR) | (pixels >= 255 - _NEAR)
        return bool(near.mean() > 0.9 and np.ptp(pixels, axis=-1).mean() < _NEAR)
    raw = read_mask(data, where).resolved()
    values, counts = np.unique(raw.pixels, return_counts=True)
    most = np.sort(counts)[::-1][:16].sum()
    return bool(len(values) <= 64 or most > 0.8 * counts.sum())


def _palette(image: Image.Image) -> tuple[int, ...]:
    flat = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    return tuple((flat @ _TO_COLOUR).tolist())


def _values_or_colours(colours: Array) -> MaskPixels:
    red = colours >> 16
    if (colours == red * 0x010101).all():
        return MaskPixels(red.astype(np.uint8), colours=False)
    return MaskPixels(colours, colours=True)


def _check_transparency(pixels: Array, where: str) -> None:
    """Refuses a mask that has one colour and a transparency that varies: the mask is in that."""
    colour, alpha = pixels[..., :-1], pixels[..., -1]
    if np.ptp(alpha) and not np.ptp(colour.reshape(-1, colour.shape[-1]), axis=0).any():
        raise SampleError(
            "unreadable mask",
            f"{where} has one colour, and its mask in the transparency: save that as grey values",
        )
