"""What layouts of boxes have in common: small images, splits, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from layouts.base import picture, text
from layouts.box_files import HEIGHT, NAMES, WIDTH

COUNT = 6
CUT = {"train": 4, "val": 1, "test": 1}
"""What becomes of `COUNT` images without splits."""
SPLITS = {"train": 3, "valid": 2, "test": 1}
KEPT = {"train": 3, "val": 2, "test": 1}


def images(folder: Path, path: str, numbers: Iterable[int] = range(COUNT)) -> list[int]:
    """Writes the images `path` with the numbers in place of {}."""
    listed = list(numbers)
    for number in listed:
        picture(folder / path.format(number), number, width=WIDTH, height=HEIGHT)
    return listed


def splits() -> Iterable[tuple[str, list[int]]]:
    first = 0
    for split, count in SPLITS.items():
        yield split, list(range(first, first + count))
        first += count


def in_splits(image: str, label: str, content: Callable[[int], str], folder: Path) -> None:
    """An image and a label file for each number, with the name of the split in place of {split}."""
    for split, numbers in splits():
        for number in numbers:
            images(folder, image.replace("{split}", split), [number])
            text(folder / label.replace("{split}", split).format(number), content(number))


def each(image: str, label: str, content: Callable[[int], str], folder: Path) -> None:
    for number in images(folder, image):
        text(folder / label.format(number), content(number))


BOXES: dict[str, Any] = {"task": "detection", "classes": NAMES, "samples": CUT, "objects": COUNT}
MASKS: dict[str, Any] = {**BOXES, "task": "instance_segmentation"}
BY_NAME: dict[str, Any] = {**BOXES, "classes": ("blue", "red")}
