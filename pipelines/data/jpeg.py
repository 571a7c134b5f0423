"""A fast decoder for ordinary JPEG files, and which files these are.

In: the bytes of a JPEG file. Out: its pixels, or None if Pillow has to decode it. Must not know
shards, batches, or the images of a data set.

simplejpeg is a thin layer over a libjpeg-turbo of its own. For small images it takes a sixth of
Pillow's time, and for ordinary files it gives identical pixels, at full size and at 1/2, 1/4 and
1/8 of it. A file is ordinary if its markers alone show it: 8 bits, baseline or progressive, grey or
YCbCr in one of the common samplings, upright, one image in the file. All other files, and those
that the fast decoder refuses, are left to Pillow.

On a platform without simplejpeg, torchvision's decoder is used as long as torchvision has one, then
Pillow. All of them give the same pixels. TorchCodec, to which torchvision moves its decoder, can't
decode at a smaller size, and each of its versions needs one version of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_SOF = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all with Huffman codes
_SOS = 0xDA
SCAN = b"\xff\xda"
MAX_SCANS = 100
"""The most scans of one file. Each scan of a progressive JPEG is a pass over all pixels, however
few bytes it has; usual files have about ten."""
LARGE_PIXELS = 2_000_000
"""In smaller images, scans cost too little to count them."""
_HARMLESS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xE1, 0xE2, 0xEE})
"""Tables, restart interval, comments, data of applications: none of them changes pixels."""
_EXIF, _EXTRA = 0xE1, 0xE2
_GREY = (b"\x11",)
_COLOUR = (b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")
"""Sampling factors of the components: grey; 4:4:4, 4:2:2 and 4:2:0."""
_IDS = (b"\1\2\3", b"\0\1\2")
"""Component ids of YCbCr; the ids b"RGB" would mean RGB pixels."""
_UPRIGHT = (b"\x12\x01\x03\0\x01\0\0\0\x01\0", b"\x01\x12\0\x03\0\0\0\x01\0\x01")
"""The EXIF entry "orientation: upright", in both byte orders."""
Header = tuple[int, int, int, int]
SHRINKS = (8, 4, 2)
"""By how much an image can be shrunk while it is decoded. libjpeg has other fractions of 8, but no
vector code for them: 5/8 takes longer than full size."""


def read_header(data: Sequence[int]) -> Header | None:
    """Returns (height, width, components, bytes before the first scan) of an ordinary JPEG, else
    None. `data` is bytes or a memoryview."""
    frame, at, end = None, 2, len(data) - 10
    if end < 0 or data[0] != 0xFF or data[1] != 0xD8:
        return None
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SOS:
            return (*frame, at + 2) if frame else None
        after = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in _SOF:
            if frame is not None:
                return None
            frame = _read_frame(bytes(data[at + 4 : after]))
            if frame is None:
                return None
        elif marker not in _HARMLESS and not _is_plain(marker, bytes(data[at + 4 : after])):
            return None
        at = after
    return None


class FastDecoder:
    """Decodes ordinary JPEGs of at most `max_pixels` pixels to `channels` channels, 1 or 3. Not
    thread-safe."""

    def __init__(self, channels: int, max_pixels: int) -> None:
        self._channels, self._max_pixels = channels, max_pixels
        self._seen = b""
        self._size = (0, 0)

    def size(self, data: memoryview) -> tuple[int, int] | None:
        """Height and width of the file's image; None if Pillow has to decode the file."""
        # Files of one size by one program mostly have equal headers: then they are parsed once.
        if not self._seen or data[: len(self._seen)] != self._seen:
            header = read_header(data)
            if header is None or not self._accepts(*header[:3]):
                return None
            self._seen = bytes(data[: header[3]])
            self._size = header[:2]
        return self._size

    def __call__(
        self, data: memoryview, tensor: Tensor | None = None, *, shrink: int = 1
    ) -> Tensor | None:
        """Decodes to uint8 (C, H, W), stored as (H, W, C); None if Pillow has to decode the file,
        also if it is damaged.

        `tensor`, uint8 (N,), holds the same bytes if the caller has it, which may save a copy. With
        `shrink`, 1 or one of `SHRINKS`, the image has ceil(H / shrink) by ceil(W / shrink) pixels;
        its shorter side must have 8 pixels or more.
        """
        size, decode = self.size(data), backend()
        if size is None or decode is None:
            return None
        if size[0] * size[1] > LARGE_PIXELS and bytes(data).count(SCAN) > MAX_SCANS:
            return None
        least = (-(-size[0] // shrink), -(-size[1] // shrink))
        return decode(data, tensor, self._channels, least if shrink > 1 else None)

    def _accepts(self, height: int, width: int, components: int) -> bool:
        if height * width > self._max_pixels:
            return False
        # Colour becomes grey by Pillow's formula; the luminance in the file differs from it.
        return self._channels == 3 or (self._channels, components) == (1, 1)


def _read_frame(frame: bytes) -> tuple[int, int, int] | None:
    components = frame[5] if len(frame) > 5 else 0
    if len(frame) != 6 + 3 * components or frame[0] != 8:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    names, samplings = frame[6::3], frame[7::3]
    plain = samplings in _GREY or (samplings in _COLOUR and names in _IDS)
    return (height, width, components) if plain and height and width else None


def _is_plain(marker: int, segment: bytes) -> bool:
    """Whether a segment that could change the pixels does not."""
    if marker == _EXTRA:  # a file of several images
        return not segment.startswith(b"MPF")
    if marker != _EXIF:  # Adobe's colour transform, or an unknown marker
        return False
    if segment.startswith(b"Exif\0\0"):
        for entry in _UPRIGHT:
            segment = segment.replace(entry, b"")
        return b"\x12\x01" not in segment and b"\x01\x12" not in segment
    return b"rientation" not in segment


Decode = Callable[[memoryview, Tensor | None, int, tuple[int, int] | None], Tensor | None]
"""From (bytes, the same bytes as a tensor or None, channels, height and width to shrink to or None)
to pixels as `FastDecoder` returns them."""


@cache
def backend() -> Decode | None:
    """The fastest decoder that this machine has; None if only Pillow is left. Decided once, so that
    a missing library is never taken for a damaged file."""
    return next((decode for make in BACKENDS.values() if (decode := make())), None)


def _simplejpeg() -> Decode | None:
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None

    def decode(
        data: memoryview, tensor: Tensor | None, channels: int, least: tuple[int, int] | None
    ) -> Tensor | None:
        height, width = least or (0, 0)
        try:
            pixels = decode_jpeg(
                data, "RGB" if channels == 3 else "GRAY", min_height=height, min_width=width
            )
        except ValueError:  # also for what libjpeg only warns of
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    return decode


def _torchvision() -> Decode | None:
    try:
        import torchvision  # noqa: F401  (registers the operator)

        operator: Any = torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None

    def decode(
        data: memoryview, tensor: Tensor | None, channels: int, least: tuple[int, int] | None
    ) -> Tensor | None:
        if least is not None:  # it decodes at full size only
            return None
        if tensor is None:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        try:
            pixels: Tensor = operator(tensor, channels)
        except RuntimeError:
            return None
        return pixels

    return decode


BACKENDS: dict[str, Callable[[], Decode | None]] = {
    "simplejpeg": _simplejpeg,
    "torchvision": _torchvision,
}
"""The fastest first. Each returns None where its library is missing."""
