"""Small shards of a classification data set, and a reader of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.data.card import Card, ImageCard, SplitCard
from pipelines.data.shards import Packed, ShardReader, Stored


def some(count: int, size: int = 700) -> Iterator[Packed]:
    """Samples of three classes, with an image of `size` bytes and more."""
    for i in range(count):
        image, note = ("jpg", bytes([i]) * (size + i)), ("cls", b"%d" % (i % 3))
        yield Packed(f"train/a/{i:03d}", image, note, i % 3)


def stored(count: int, size: int = 700) -> list[Stored]:
    """What a reader returns for the samples of `some`."""
    return [Stored(p.key, p.image[1], p.note[1], p.label) for p in some(count, size) if p.note]


def card_of(split: SplitCard) -> Card:
    image = ImageCard(
        channels=3,
        min_height=1,
        max_height=1,
        min_width=1,
        max_width=1,
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    classes, task = ("a", "b", "c"), "classification"
    return Card(name="x", task=task, classes=classes, image=image, splits={"train": split})


def reader_of(folder: Path, split: SplitCard) -> ShardReader:
    return ShardReader(folder, card_of(split), "train")


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flips a bit of the byte `at` of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
