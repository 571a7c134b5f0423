"""Scales pixels of more than 8 bits to 8 bits.

In: an image as Pillow decodes it. Out: an image of mode L. Must not know where its bytes come from.

The rule, for grey images with integers of more than 8 bits:

- A range that the user gives (`ImageReading.range`) becomes 0 to 255; values outside are clipped.
- Else a TIFF says how many bits it has: 0 to 4095 for 12 bits. A `MaxSampleValue` that is one less
  than a power of two says the same of a wider file; other values are statistics.
- Else, 0 to 65535 is the range: that of 16-bit PNG and of PPM and JPEG 2000, which Pillow scales to
  16 bits. Integers outside it are refused.

Floats have no range of their own, and are refused without one. `MinIsWhite` means that the highest
value is black. What Pillow decodes wrongly is refused: signed 8-bit pixels, and uncompressed colour
planes of more than 8 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.image_reading import ImageReading

Array = np.ndarray[Any, Any]
_BITS, _COMPRESSION, _PHOTOMETRIC, _MAX_VALUE = 258, 259, 262, 281
_PLANAR, _SAMPLE_FORMAT = 284, 339
_MIN_IS_WHITE, _UNCOMPRESSED, _SEPARATE, _SIGNED = 0, 1, 2, 2
WIDE_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")
LARGEST = 65535
DARK = 4096
"""Images of 16 bits without a value from here on would be nearly black."""


class Encoding(NamedTuple):
    """What a file says about its values.

    largest   the highest value that a pixel can have; None where the file doesn't say
    inverted  whether that is black
    unsigned  whether 32-bit integers have no sign
    colour    whether these are 16-bit colours, of which Pillow keeps the upper half
    """

    largest: int | None = None
    inverted: bool = False
    unsigned: bool = False
    colour: bool = False


class Highest(NamedTuple):
    """The highest value in an image, and whether it has colours."""

    value: int
    colour: bool

    @property
    def dark(self) -> bool:
        """Whether an image without a higher value would be nearly black."""
        return 0 < self.value < DARK

    def hint(self) -> str:
        """What to do about dark images: an option for grey ones, of colours only the upper 8 bits
        are read."""
        keep = f"--option range=0..{LARGEST} to keep them dark"
        if self.colour:
            return f"convert the colours to 8 bits; or {keep}"
        likely = max(2 ** self.value.bit_length() - 1, 255)
        return f"say which values are black and white: --option range=0..{likely}; or {keep}"


def encoding_of(image: Image.Image, data: bytes, where: str) -> Encoding:
    """Raises TesseraError for a TIFF that Pillow decodes wrongly."""
    if image.format == "PNG":
        return Encoding(colour=data[24:25] == b"\x10" and image.mode not in WIDE_MODES)
    if image.format != "TIFF":
        return Encoding(LARGEST)
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits = int(tags.get(_BITS, (8,))[0])
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    if signed and image.mode not in WIDE_MODES:
        raise TesseraError(
            f"{where} has signed pixels of {bits} bits, which are not read",
            hint="convert it to unsigned",
        )
    planes = tags.get(_PLANAR) == _SEPARATE and len(tags.get(_BITS, ())) > 1
    if planes and bits > 8 and tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED:
        raise TesseraError(
            f"{where} has a plane of {bits} bits for each colour, which are not read",
            hint="convert it to 8 bits, or to interleaved pixels",
        )
    return Encoding(
        _largest(bits, tags.get(_MAX_VALUE)),
        inverted=tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE and image.mode in WIDE_MODES,
        unsigned=bits == 32 and not signed and image.mode == "I",
        colour=bits == 16 and image.mode not in WIDE_MODES,
    )


def to_8_bits(
    image: Image.Image, encoding: Encoding, reading: ImageReading, where: str
) -> Image.Image:
    """An image of one of `WIDE_MODES` as mode L. Raises TesseraError if its range is unknown."""
    pixels = _values(image, encoding)
    if reading.range is not None:
        low, high = reading.range
        share = (pixels.astype(np.float64) - low) / (high - low)
        share = np.nan_to_num(share).clip(0, 1)
        scaled = np.rint((1 - share if encoding.inverted else share) * 255)
        return Image.fromarray(scaled.astype(np.uint8))
    if image.mode == "F":
        raise TesseraError(
            f"{where} has float pixels, whose range is unknown",
            hint="give it: --option range=0..1; or convert it to 8 or 16 bits",
        )
    if pixels.min() < 0 or pixels.max() > LARGEST:
        raise TesseraError(
            f"{where} has integer pixels outside 0 to {LARGEST}: {pixels.min()} to {pixels.max()}",
            hint="give their range: --option range=LOW..HIGH; or convert it to 8 or 16 bits",
        )
    largest = encoding.largest or LARGEST
    if encoding.inverted:
        pixels = largest - pixels
    scaled = (pixels.clip(0, largest) * 255 + largest // 2) // largest
    return Image.fromarray(scaled.astype(np.uint8))


def undeclared_maximum(image: Image.Image, encoding: Encoding) -> Highest | None:
    """The highest value of a loaded image whose file doesn't say what the highest value can be;
    None if it says so, or has no more than 8 bits."""
    if encoding.largest is not None or image.mode == "F":
        return None
    if encoding.colour:
        extrema = np.asarray(image)
        return Highest(int(extrema.max(initial=0)) * 256 + 255, colour=True)
    if image.mode not in WIDE_MODES:
        return None
    return Highest(int(_values(image, encoding).max(initial=0)), colour=False)


def _values(image: Image.Image, encoding: Encoding) -> Array:
    pixels = np.asarray(image)
    if image.mode == "F":
        return pixels
    if encoding.unsigned:
        pixels = pixels.view(np.uint32)
    return pixels.astype(np.int64)


def _largest(bits: int, stated: Any) -> int | None:
    if bits < 16:
        return int(2**bits - 1)
    value = int(stated[0]) if isinstance(stated, tuple) and stated else 0
    is_depth = value > 255 and value & (value + 1) == 0 and bits == 16
    return value if is_depth else None
