"""Formats of image files: which one the bytes have, and whether their structure is complete.

In: the bytes of a file. Out: Pillow's name of the format, and an image whose header is read. Must
not know what becomes of the pixels.

Pillow reads all formats but HEIF. `pillow-heif` reads that, and is loaded for the first HEIF file.
"""

from __future__ import annotations

import io
import zlib
from functools import cache

from PIL import Image

from models.core.errors import TesseraError
from pipelines.data.jpeg import MAX_SCANS, SCAN

SUPPORTED = "JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, JPEG 2000, HEIF and AVIF"
PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
"""How a JP2 file begins, and a bare codestream."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_MAX_BRANDS = 256
_HEAD_BYTES = 1 << 16
_SUBFILE_TYPE, _REDUCED = 254, 1
MAX_FRAMES = 10_000
"""Of one file; further ones are not read."""


def sniff(data: bytes) -> str | None:
    """Returns Pillow's name of the format by the first bytes; None for a format that is not
    read."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == PNG_START:
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM":
        return "BMP"
    if data[:4] in _TIFF:
        return "TIFF"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in (b" ", b"\t", b"\n", b"\r"):
        return "PPM"
    if data[:12] == _JPEG_2000[0] or data[:4] == _JPEG_2000[1]:
        return "JPEG2000"
    return _sniff_heif(data) if data[4:8] == b"ftyp" else None


def _sniff_heif(data: bytes) -> str | None:
    """AVIF and HEIF are the same container: the brands in its first box tell them apart."""
    size = min(int.from_bytes(data[:4], "big"), 16 + 4 * _MAX_BRANDS, len(data))
    brands = {data[8:12], *(bytes(data[at : at + 4]) for at in range(16, size - 3, 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


def open_lazily(data: bytes, form: str) -> Image.Image:
    """Opens the image and reads its header only. Raises whatever Pillow's plugins raise."""
    if form == "HEIF":
        _register_heif()
    return Image.open(io.BytesIO(data), formats=[form])


def list_frames(data: bytes) -> list[int]:
    """The numbers of the frames of an animation, or of the pages of a TIFF without its thumbnails;
    [0] for other images, for what a JPEG has beside its image, and for damaged ones."""
    form = sniff(data)
    if form is None or not _may_have_frames(data, form):
        return [0]
    try:
        if form == "GIF":
            return list(range(max(min(_walk_gif(data, "x"), MAX_FRAMES), 1)))
        with open_lazily(data, form) as image:
            if form == "TIFF":
                return _list_pages(image)
            return list(range(min(int(getattr(image, "n_frames", 1)), MAX_FRAMES)))
    except Exception:  # Pillow's plugins raise nearly everything on damaged bytes
        return [0]


def _may_have_frames(data: bytes, form: str) -> bool:
    if form == "PNG":
        return b"acTL" in data[:_HEAD_BYTES]
    if form == "WEBP":
        return data[12:16] == b"VP8X" and bool(data[20] & 2)
    return form in ("GIF", "TIFF", "HEIF", "AVIF")


def _list_pages(image: Image.Image) -> list[int]:
    """The pages of a TIFF that are not smaller copies of others. Pillow would count all pages, of
    which a file can have millions."""
    pages = []
    for number in range(MAX_FRAMES):
        try:
            image.seek(number)
        except EOFError:
            break
        kind: int = image.tag_v2.get(_SUBFILE_TYPE, 0)  # type: ignore[attr-defined]
        if not kind & _REDUCED:
            pages.append(number)
    return pages or [0]


@cache
def _register_heif() -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener(thumbnails=False)


def check_structure(data: bytes, form: str, where: str) -> None:
    """Raises TesseraError for damage that Pillow passes over, and for a JPEG that takes too long.
    Bytes after the end of an image are passed over, as all decoders do."""
    if form == "PNG":
        _check_png(data, where)
    if form == "JPEG" and data.count(SCAN) > MAX_SCANS:
        raise TesseraError(f"{where} is a JPEG with more than {MAX_SCANS} scans, which is refused")
    if form == "GIF":
        _walk_gif(data, where)


def _check_png(data: bytes, where: str) -> None:
    """Checks that every chunk is complete: Pillow accepts a PNG that is cut short."""
    at, kind = len(PNG_START), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        crc32 = int.from_bytes(data[end - 4 : end], "big")
        if end > len(data) or zlib.crc32(memoryview(data)[at + 4 : end - 4]) != crc32:
            raise TesseraError(f"{where} is a damaged PNG: its chunk {kind!r} is incomplete")
        at = end


def _walk_gif(data: bytes, where: str) -> int:
    """The number of images in a GIF. Raises TesseraError unless all blocks up to the end mark are
    there: Pillow stops reading at the end of the pixels."""
    images, at = 0, 13 + _palette_size(data[10:11])
    while (kind := data[at : at + 1]) != b";":
        if kind == b"!":  # an extension: its label, then blocks
            at = _skip_blocks(data, at + 2)
        elif kind == b",":  # an image: its size, a palette, a code size, then blocks
            images += 1
            at = _skip_blocks(data, at + 11 + _palette_size(data[at + 9 : at + 10]))
        elif kind == b"\0":  # a stray end of blocks, which some programs write
            at += 1
        else:
            raise TesseraError(f"{where} is a damaged GIF: its end is missing")
    return images


def _palette_size(flags: bytes) -> int:
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1
