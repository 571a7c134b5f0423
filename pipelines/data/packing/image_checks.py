"""What is decided about the images of a source before they are packed.

In: a `Source`. Out: the same with an item for each frame; or an error for images whose range of
values nobody says. Must not know formats, plans or shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from models.core.errors import TesseraError, UsageError
from pipelines.data import images
from pipelines.data.image_formats import list_frames, sniff
from pipelines.data.image_reading import ImageReading
from pipelines.data.packing.plan import split_items
from pipelines.data.pixel_values import LARGEST, Highest
from pipelines.data.sources import IMAGE_SUFFIXES, Item, Source

PROBED = 64
"""Images that are read, evenly spread, to find out whether 16-bit values are those of 16 bits."""
_WIDE_FORMATS = ("PNG", "TIFF")
_NARROW_SUFFIXES = IMAGE_SUFFIXES - {".png", ".apng", ".tif", ".tiff"}
"""Files with these names aren't read to find out."""


def check_range(source: Source, reading: ImageReading) -> None:
    """Raises UsageError if images with 16 or 32 bits have the values of fewer bits.

    Whether one dark image has 12 bits can't be seen; that no image of a set is brighter can.
    """
    if reading.range is not None:
        return
    largest = [value for value in _undeclared(source) if value is not None]
    highest = max((one.value for one in largest), default=0)
    found = Highest(highest, colour=any(one.colour for one in largest))
    if not found.dark:
        return
    raise UsageError(
        f"no pixel of {len(largest)} images with 16 or 32 bits is above {highest:,}: scaled from "
        f"0..{LARGEST:,} they would be nearly black",
        hint=found.hint(),
    )


def _suffix(item: Item) -> str:
    return os.path.splitext(item.origin)[1].lower()


def _undeclared(source: Source) -> Iterator[Highest | None]:
    items = [i for i in source.items if not i.problem and _suffix(i) not in _NARROW_SUFFIXES]
    for item in items[:: max(len(items) // PROBED, 1)]:
        try:
            data = source.load(item)
            if sniff(data) in _WIDE_FORMATS:
                yield images.undeclared_maximum(data, item.origin)
        except TesseraError:  # is rejected when it is packed
            continue


def expand_frames(source: Source, seed: int) -> Source:
    """The source with an item for each frame of each file. All frames of a file are in one split:
    they look alike. Raises UsageError for a task whose labels belong to the whole file."""
    if source.annotate is not None:
        raise UsageError(
            f"frames=all doesn't fit {source.task.replace('_', ' ')}: a label file describes one "
            "image",
            hint="leave frames=all out: the first frame is packed",
        )
    split_of = {
        item.key: split
        for split, items in split_items(source.items, seed).items()
        for item in items
    }
    return replace(
        source,
        items=[
            replace(one, split=split_of[item.key])
            for item in source.items
            for one in _frames(source, item)
        ],
    )


def _frames(source: Source, item: Item) -> list[Item]:
    if item.problem:
        return [item]
    try:
        numbers = list_frames(source.load(item))
    except TesseraError:  # is rejected when it is packed
        return [item]
    if len(numbers) == 1:
        return [item]
    return [replace(item, key=f"{item.key}~{n:04d}", frame=n) for n in numbers]
