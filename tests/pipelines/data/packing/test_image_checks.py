"""Ranges of values and frames are decided before anything is packed."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from layouts.base import picture
from PIL import Image

from models.core.errors import TesseraError, UsageError
from pipelines.data import card as cards
from pipelines.data.card import Card
from pipelines.data.image_reading import ImageReading, parse_options
from pipelines.data.images import decode_image
from pipelines.data.packing.pack import pack
from pipelines.data.shards import ShardReader


def packed(folder: Path, **options: str) -> tuple[Card, list[str]]:
    lines: list[str] = []
    to = folder.parent / f"packed{'-'.join(options.values()).replace('.', '')}"
    return pack(str(folder), to, options=options, notify=lines.append, format="images"), lines


def wide(folder: Path, largest: int, count: int = 4, suffix: str = ".png") -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, largest, (16, 24)).astype(np.uint16)
        pixels[0, 0] = largest
        Image.fromarray(pixels).save(folder / f"{number}{suffix}")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("largest", "likely"), [(4095, 4095), (900, 1023), (200, 255)])
def test_a_set_of_dark_16_bit_images_is_asked_about(
    tmp_path: Path, suffix: str, largest: int, likely: int
) -> None:
    folder = wide(tmp_path / "scans", largest, suffix=suffix)
    with pytest.raises(UsageError, match=f"4 images with 16 or 32 bits is above {largest:,}") as e:
        packed(folder)
    assert f"--option range=0..{likely};" in (e.value.hint or "")
    card, _ = packed(folder, range="0..4095")
    reader = ShardReader(tmp_path / "packed04095", card, "train")
    stored = decode_image(reader.read(0).image, 1)
    assert int(stored.max()) == round(largest / 4095 * 255)


def test_one_bright_image_shows_that_all_have_16_bits(tmp_path: Path) -> None:
    """The control: such a set is packed, its other images may be dark."""
    folder = wide(tmp_path / "scans", 4095)
    Image.fromarray(np.full((16, 24), 60_000, np.uint16)).save(folder / "bright.png")
    assert packed(folder)[0].split("train").samples == 3


def colours(folder: Path, largest: int) -> Path:
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, largest, (16, 24, 3)).astype(np.uint16)
        (folder / f"{number}.png").write_bytes(png_of_16_bits(pixels))
    return folder


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Pillow writes no colours of 16 bits."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_the_hint_about_dark_colours_works(tmp_path: Path) -> None:
    """Of colours only the upper 8 bits are read, so no other range fits."""
    folder = colours(tmp_path / "scans", 4095)
    with pytest.raises(UsageError, match="nearly black") as caught:
        packed(folder)
    assert "convert the colours to 8 bits" in (caught.value.hint or "")
    named = re.findall(r"--option range=([0-9.]+)", caught.value.hint or "")
    assert named == ["0..65535"]
    assert packed(folder, range=named[0])[0].image.channels == 3


def test_bright_colours_of_16_bits_are_packed(tmp_path: Path) -> None:
    """The control."""
    assert packed(colours(tmp_path / "scans", 65535))[0].image.range is None


def test_the_card_keeps_how_files_were_read(tmp_path: Path) -> None:
    folder = wide(tmp_path / "scans", 4095)
    card, _ = packed(folder, range="0..4095", max_pixels="400")
    assert card.image.reading == ImageReading((0, 4095), max_pixels=400)
    assert cards.parse(card.to_json(), "x") == card
    plain, _ = packed(folder, range="0..65535")
    assert "max_pixels" not in plain.to_json()
    assert plain.digest != card.digest


def test_an_image_over_the_limit_is_packed_with_the_option_that_is_named(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "scans" / f"{number}.png", number)
    with pytest.raises(TesseraError, match="more than 100") as caught:
        packed(tmp_path / "scans", max_pixels="100")
    named = re.search(r"--option (max_pixels)=([0-9]+)", str(caught.value))
    assert named is not None
    card, _ = packed(tmp_path / "scans", **{named[1]: named[2]})
    assert card.image.max_pixels == int(named[2])
    assert card.spec().height == card.image.max_height


@pytest.mark.parametrize("text", ["0", "-1", "many", "1e9", "9" * 30])
def test_a_limit_that_is_no_number_of_pixels_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the option max_pixels can't be"):
        parse_options({"max_pixels": text})


def test_dark_images_can_be_kept_dark(tmp_path: Path) -> None:
    assert packed(wide(tmp_path / "scans", 4095), range="0..65535")[0].split("train").samples == 2


def animation(path: Path, frames: int, form: str) -> None:
    made = []
    for number in range(frames):
        made.append(Image.open(picture(path.parent / "frame.png", 10 * frames + number)))
        made[-1].load()
    (path.parent / "frame.png").unlink()
    options = {"lossless": True} if form == "WEBP" else {}
    made[0].save(path, form, save_all=True, append_images=made[1:], **options)


KINDS = [("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")]


@pytest.mark.parametrize(("form", "suffix"), KINDS)
def test_of_several_frames_the_first_is_packed_and_said_or_all_are(
    tmp_path: Path, form: str, suffix: str
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(3):
        animation(folder / f"{number}{suffix}", 3 + number, form)
    picture(folder / "still.jpg", 999)
    card, lines = packed(folder)
    assert sum(split.samples for split in card.splits.values()) == 4
    assert any(line.startswith("3 files have several frames or pages") for line in lines)
    card, lines = packed(folder, frames="all")
    assert sum(split.samples for split in card.splits.values()) == 3 + 4 + 5 + 1
    assert not any("several frames" in line for line in lines)
    for split in card.splits:
        reader = ShardReader(tmp_path / "packedall", card, split)
        keys = [reader.read(number).key.partition("~")[0] for number in range(len(reader))]
        assert len(set(keys)) == {"train": 2, "val": 1, "test": 1}[split]


def test_stills_have_one_frame(tmp_path: Path) -> None:
    """The control."""
    for number, (form, suffix) in enumerate(KINDS):
        picture(tmp_path / "stills" / f"{number}{suffix}", number, form=form)
    assert not any("several frames" in line for line in packed(tmp_path / "stills")[1])
