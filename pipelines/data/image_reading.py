"""How image files are read where they don't say it themselves.

In: the options of a user. Out: an `ImageReading`, which is in effect for a block of code. Must not
know formats of data sets, nor decode anything.

It is a context variable and no argument: importers read images and their sizes in many places, and
all of them must read an image in the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from models.core.errors import UsageError

MAX_PIXELS = 100_000_000
"""The most pixels of one image, unless the option `max_pixels` says otherwise."""
MOST_PIXELS = 1 << 32
"""The most that the option can say."""
OPTIONS: Mapping[str, str] = {
    "frames": "first (default) or all: of animations and of files with several pages",
    "range": "LOW..HIGH: the values that become black and white, of images with more than 8 bits: "
    "0..4095 for 12 bits, 0..1 for floats",
    "max_pixels": f"the most pixels of an image, by default {MAX_PIXELS:,}; one has all of them in "
    "memory at a time",
}
"""Options that every format takes."""
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class ImageReading:
    """range       the values that become 0 and 255, for grey images of more than 8 bits and floats;
                None for the rule of `pixel_values`
    all_frames  whether each frame of a file is an image of its own
    max_pixels  an image with more pixels is refused before it is decoded
    """

    range: tuple[float, float] | None = None
    all_frames: bool = False
    max_pixels: int = MAX_PIXELS


_DEFAULT = ImageReading()
_current: ContextVar[ImageReading] = ContextVar("image_reading", default=_DEFAULT)


def current() -> ImageReading:
    return _current.get()


@contextmanager
def reading_images(reading: ImageReading) -> Iterator[None]:
    """Reads images so inside the block."""
    token = _current.set(reading)
    try:
        yield
    finally:
        _current.reset(token)


def parse_options(options: Mapping[str, str]) -> ImageReading:
    """The reading that these options describe; others are passed over. Raises UsageError."""
    if options.get("frames", "first") not in ("first", "all"):
        raise UsageError(
            f"the option frames can't be {options['frames']!r}", hint="give first or all"
        )
    return ImageReading(
        range=parse_range(options["range"]) if "range" in options else None,
        all_frames=options.get("frames") == "all",
        max_pixels=_parse_pixels(options["max_pixels"]) if "max_pixels" in options else MAX_PIXELS,
    )


def parse_range(text: str) -> tuple[float, float]:
    """LOW..HIGH. Raises UsageError."""
    match = _RANGE.fullmatch(text)
    low, high = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if low >= high or not math.isfinite(high - low):
        raise UsageError(f"the range {text!r} is not LOW..HIGH", hint="as in 0..4095")
    return low, high


def _parse_pixels(text: str) -> int:
    plain = text.replace(",", "").replace("_", "").strip()
    number = int(plain) if re.fullmatch("[0-9]{1,19}", plain) else 0
    if not 1 <= number <= MOST_PIXELS:
        raise UsageError(
            f"the option max_pixels can't be {text!r}",
            hint=f"give a number of pixels, 1 to {MOST_PIXELS:,}",
        )
    return number
