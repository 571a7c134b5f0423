"""Ranges of values and frames are decided before anything is packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts.base import picture
from PIL import Image

from models.core.errors import UsageError
from pipelines.data.card import Card
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
