"""Layouts of data sets for classification, and of images without labels."""

from __future__ import annotations

from pathlib import Path

from layouts.base import Layout, picture


def class_folders(folder: Path, paths: dict[str, int], suffix: str = ".jpg") -> None:
    """Writes the given number of images into each folder."""
    for at, (path, count) in enumerate(paths.items()):
        for number in range(count):
            picture(folder / path / f"{number}{suffix}", 1000 * at + number)


LAYOUTS = [
    Layout(
        "a folder for each class",
        "torchvision's ImageFolder",
        lambda folder: class_folders(folder, {"cat": 4, "dog": 4}),
        classes=("cat", "dog"),
        samples={"train": 4, "val": 2, "test": 2},
    ),
]
