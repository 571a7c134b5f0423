"""What becomes of pixels of more than 8 bits: scaled by a rule, or refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

from models.core.errors import TesseraError
from pipelines.data import images
from pipelines.data.image_reading import ImageReading, reading_images

RAMP = np.linspace(0, 1, 256).reshape(8, 32)
TO_8_BITS = np.rint(RAMP * 255).astype(np.uint8)


def tiff(samples: bytes, width: int, height: int, **tags: int | tuple[int, ...]) -> bytes:
    """An uncompressed TIFF. Tags are given as t258=12."""
    values: dict[int, tuple[int, ...]] = {256: (width,), 257: (height,), 258: (16,), 259: (1,)}
    values |= {262: (1,), 273: (0,), 277: (1,), 278: (height,), 279: (len(samples),)}
    for name, value in tags.items():
        values[int(name[1:])] = value if isinstance(value, tuple) else (value,)
    planes = len(values[258]) if values.get(284) == (2,) else 1
    length = len(samples) // planes
    values |= {273: (0,) * planes, 279: (length,) * planes}
    end = 8 + 2 + 12 * len(values) + 4
    extra = b"".join(struct.pack(f"<{len(v)}I", *v) for v in values.values() if len(v) > 1)
    values[273] = tuple(end + len(extra) + number * length for number in range(planes))
    entries, extra = b"", b""
    for tag, value in sorted(values.items()):
        if len(value) == 1:
            entries += struct.pack("<HHII", tag, 4, 1, value[0])
        else:
            entries += struct.pack("<HHII", tag, 4, len(value), end + len(extra))
            extra += struct.pack(f"<{len(value)}I", *value)
    head = b"II*\0" + struct.pack("<IH", 8, len(values))
    return head + entries + bytes(4) + extra + samples


def ramp(largest: int, dtype: str = "<u2") -> bytes:
    return np.rint(RAMP * largest).astype(dtype).tobytes()


def packed_12_bits() -> bytes:
    values = np.rint(RAMP * 4095).astype(int).reshape(-1, 2)
    return b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.tolist())


def grey(data: bytes, reading: ImageReading = ImageReading()) -> np.ndarray:  # noqa: B008 - frozen
    with reading_images(reading):
        return np.asarray(images.open_image(data, "x"))


def ranged(low: float, high: float) -> ImageReading:
    return ImageReading(range=(low, high))


FILES: Mapping[str, bytes] = {
    "16 bits": tiff(ramp(65535), 32, 8),
    "12 bits": tiff(packed_12_bits(), 32, 8, t258=12),
    "12 in 16, stated": tiff(ramp(4095), 32, 8, t281=4095),
    "10 in 16, stated": tiff(ramp(1023), 32, 8, t281=1023),
    "32 bits": tiff(ramp(65535, "<i4"), 32, 8, t258=32, t339=2),
}


@pytest.mark.parametrize("name", list(FILES))
def test_the_whole_range_becomes_0_to_255(name: str) -> None:
    difference = np.abs(grey(FILES[name]).astype(int) - TO_8_BITS)
    assert difference.max() <= 1


@pytest.mark.parametrize("name", ["16 bits", "12 in 16, stated"])
def test_where_the_least_is_white_values_are_inverted(name: str) -> None:
    largest = 4095 if "12" in name else 65535
    tags = {"t281": 4095} if "12" in name else {}
    data = tiff(ramp(largest), 32, 8, t262=0, **tags)
    difference = np.abs(255 - grey(data).astype(int) - TO_8_BITS)
    assert difference.max() <= 1
    with Image.open(io.BytesIO(data)) as image:  # the control: Pillow alone doesn't invert it
        assert np.asarray(image)[0, 0] == 0


def test_a_maximum_that_is_no_power_of_two_is_a_statistic() -> None:
    dark = grey(tiff(ramp(4000), 32, 8, t281=4000))
    assert dark.max() == round(4000 / 65535 * 255)


READ_AS = {
    "12 in 16": (tiff(ramp(4095), 32, 8), (0, 4095)),
    "32-bit unsigned": (tiff(ramp(4_000_000_000, "<u4"), 32, 8, t258=32), (0, 4e9)),
    "16-bit signed": (
        tiff((np.rint(RAMP * 3000) - 1000).astype("<i2").tobytes(), 32, 8, t339=2),
        (-1000, 2000),
    ),
    "float": (tiff(RAMP.astype("<f4").tobytes(), 32, 8, t258=32, t339=3), (0, 1)),
}


@pytest.mark.parametrize("name", list(READ_AS))
def test_a_given_range_becomes_0_to_255(name: str) -> None:
    data, (low, high) = READ_AS[name]
    assert np.abs(grey(data, ranged(low, high)).astype(int) - TO_8_BITS).max() <= 1
    middle = (low + high) / 2  # values outside of a range are clipped
    upper = grey(data, ranged(middle, high))
    assert (upper[:4] == 0).all()
    assert upper.max() == 255


@pytest.mark.parametrize("name", ["32-bit unsigned", "16-bit signed", "float"])
def test_values_of_unknown_range_are_refused_with_the_option(name: str) -> None:
    with pytest.raises(TesseraError, match=r"range is unknown|outside 0") as caught:
        grey(READ_AS[name][0])
    assert "--option range=" in (caught.value.hint or "")


def test_floats_where_the_least_is_white_and_what_is_no_number() -> None:
    values = RAMP.astype("<f4")
    data = tiff(values.tobytes(), 32, 8, t258=32, t339=3, t262=0)
    assert np.abs(255 - grey(data, ranged(0, 1)).astype(int) - TO_8_BITS).max() <= 1
    values = values.copy()
    values[0, 5], values[0, 6] = np.nan, np.inf
    found = grey(tiff(values.tobytes(), 32, 8, t258=32, t339=3), ranged(0, 1))
    assert (found[0, 5], found[0, 6]) == (0, 255)


def test_what_pillow_decodes_wrongly_is_refused() -> None:
    signed = tiff((np.rint(RAMP * 255) - 128).astype("i1").tobytes(), 32, 8, t258=8, t339=2)
    with pytest.raises(TesseraError, match="signed pixels of 8 bits"):
        grey(signed)
    planes = tiff(ramp(65535) * 3, 32, 8, t258=(16,) * 3, t262=2, t277=3, t284=2)
    with pytest.raises(TesseraError, match="a plane of 16 bits for each colour"):
        grey(planes)
    with Image.open(io.BytesIO(planes)) as image:  # the control: Pillow takes bytes for pixels
        assert np.abs(np.asarray(image)[..., 0].astype(int) - TO_8_BITS).max() > 50


def test_planes_of_8_bits_are_read() -> None:
    data = tiff(TO_8_BITS.tobytes() * 3, 32, 8, t258=(8,) * 3, t262=2, t277=3, t284=2)
    assert (grey(data) == TO_8_BITS[..., None]).all()


@pytest.mark.parametrize(
    ("name", "highest"), [("16 bits", 65535), ("12 bits", None), ("12 in 16, stated", None)]
)
def test_the_highest_value_matters_where_the_file_doesnt_say(
    name: str, highest: int | None
) -> None:
    assert images.undeclared_maximum(FILES[name], "x") == (highest and (highest, False))


def test_the_highest_value_of_other_images() -> None:
    out = io.BytesIO()
    Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16)).save(out, format="PNG")
    assert images.undeclared_maximum(out.getvalue(), "x") == (4095, False)
    out = io.BytesIO()
    Image.fromarray(TO_8_BITS).save(out, format="PNG")
    assert images.undeclared_maximum(out.getvalue(), "x") is None
    colours = tiff(ramp(4095) * 3, 32, 8, t258=(16,) * 3, t262=2, t277=3)
    assert images.undeclared_maximum(colours, "x") == (15 * 256 + 255, True)


def test_a_range_does_not_apply_to_colours_of_16_bits() -> None:
    """Pillow keeps their upper half only, so a range of the lower half would be lost."""
    colours = tiff(ramp(4095) * 3, 32, 8, t258=(16,) * 3, t262=2, t277=3)
    with pytest.raises(TesseraError, match="colours of 16 bits, which are read with the range"):
        grey(colours, ranged(0, 4095))
    assert grey(colours).max() == grey(colours, ranged(0, 65535)).max() == 15
