"""VOC's lists of the images of each split, for masks."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import pixels
from layouts.base import picture

from models.core.errors import TesseraError
from pipelines.data.importers import masks


def test_lists_assign_splits_and_choose_images(tmp_path: Path) -> None:
    pixels.context(tmp_path)
    picture(tmp_path / "JPEGImages" / "unlisted.jpg", 9)  # VOC has many without a mask
    source = masks.read(str(tmp_path), {})
    assert [(item.key, item.split) for item in source.items] == [
        ("JPEGImages/000", "train"),
        ("JPEGImages/001", "train"),
        ("JPEGImages/002", "val"),
    ]
    assert {path.name for path in source.shared_files} == {"train.txt", "val.txt"}


def test_without_lists_each_image_needs_a_mask(tmp_path: Path) -> None:
    """The control."""
    pixels.context(tmp_path)
    picture(tmp_path / "JPEGImages" / "unlisted.jpg", 9)
    for path in (tmp_path / "ImageSets" / "SegmentationContext").iterdir():
        path.unlink()
    source = masks.read(str(tmp_path), {})
    assert [item.split for item in source.items] == [None] * 4
    assert sum(bool(item.problem) for item in source.items) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("003", "names 003, which has no image"), ("000", r"000 is in train\.txt, too")],
)
def test_a_list_that_contradicts_is_refused(tmp_path: Path, line: str, message: str) -> None:
    pixels.context(tmp_path)
    path = tmp_path / "ImageSets" / "SegmentationContext" / "val.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(TesseraError, match=message):
        masks.read(str(tmp_path), {})
