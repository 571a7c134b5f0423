"""KITTI: boxes in pixels, regions without a class, images without labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts.base import text
from layouts.box_files import HEIGHT, WIDTH, box, kitti_line, yolo_line
from layouts.box_sets import COUNT, each, images

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects, check
from pipelines.data.importers import kitti, yolo
from pipelines.data.sources import Source


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    found = source.annotate(source.items[row])
    assert isinstance(found, Objects)
    return found


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("training/image_2/{}.png", "training/label_2/{}.txt"),
        ("images/{}.png", "labels/{}.txt"),
        ("train/{}.png", "train/{}.txt"),
    ],
)
def test_boxes_are_read_and_regions_left_out(tmp_path: Path, image: str, label: str) -> None:
    each(image, label, kitti_line, tmp_path)
    assert kitti.recognises(str(tmp_path)) == f"KITTI labels in {label.format(0)}"
    assert not yolo.recognises(str(tmp_path))
    source = kitti.read(str(tmp_path), {})
    assert (source.task, source.classes) == ("detection", ("blue", "red"))
    assert source.notes == (f"{COUNT} DontCare regions have no class and are left out",)
    for row in range(COUNT):
        left, top, width, height = box(row)
        found = annotated(source, row)
        check(found, height=HEIGHT, width=WIDTH, classes=2, where="x")
        assert found.boxes.tolist() == [[left, top, left + width, top + height]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Car 1 2 3", "unreadable annotation"),
        (kitti_line(0).splitlines()[0].replace("1.71", "x"), "unreadable annotation"),
        (kitti_line(0).splitlines()[0].replace("1.71", "nan"), "unreadable annotation"),
    ],
)
def test_a_damaged_line_is_a_damaged_object(tmp_path: Path, line: str, reason: str) -> None:
    each("images/{}.png", "labels/{}.txt", kitti_line, tmp_path)
    text(tmp_path / "labels" / "0.txt", f"{kitti_line(0)}{line}\n")
    found = annotated(kitti.read(str(tmp_path), {}))
    assert len(found.boxes) == 1
    assert [damage.reason for damage in found.damaged] == [reason]
    assert "labels/0.txt, line" in found.damaged[0].message


def test_a_file_of_regions_alone_is_an_image_without_objects(tmp_path: Path) -> None:
    each("images/{}.png", "labels/{}.txt", kitti_line, tmp_path)
    text(tmp_path / "labels" / "0.txt", kitti_line(0).splitlines()[1] + "\n")
    assert len(annotated(kitti.read(str(tmp_path), {})).boxes) == 0


def test_images_without_labels_are_named(tmp_path: Path) -> None:
    each("images/{}.png", "labels/{}.txt", kitti_line, tmp_path)
    images(tmp_path, "images/{}.png", [20])
    source = kitti.read(str(tmp_path), {})
    assert "1 images without text file, for example images/20.png: left out" in source.notes[1]
    assert len(kitti.read(str(tmp_path), {"unlabelled": "empty"}).items) == COUNT + 1


def test_yolo_s_labels_are_not_kitti_s(tmp_path: Path) -> None:
    each("images/{}.png", "labels/{}.txt", yolo_line, tmp_path)
    assert not kitti.recognises(str(tmp_path))
    with pytest.raises(TesseraError, match="has no labels in KITTI's format"):
        kitti.read(str(tmp_path / "images"), {})
