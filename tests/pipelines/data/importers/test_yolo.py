"""YOLO: normalised boxes and polygons; the YAML has class names and the folders of splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sample_sources
from pycocotools import mask as reference
from sample_sources import HEIGHT, WIDTH

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects, check, mask_pixels
from pipelines.data.importers import yolo
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Source

# pycocotools' arrays don't know NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    result = source.annotate(source.items[row])
    assert isinstance(result, Objects)
    return result


@pytest.mark.parametrize("splits_first", [True, False])
@pytest.mark.parametrize("polygons", [True, False])
@pytest.mark.parametrize("around", ["", "inner"])
def test_both_layouts_with_boxes_and_with_polygons_are_read(
    tmp_path: Path, splits_first: bool, polygons: bool, around: str
) -> None:
    sample_sources.yolo(tmp_path / "set" / around, polygons=polygons, splits_first=splits_first)
    folder = str(tmp_path / "set")
    assert yolo.recognises(folder)
    source = yolo.read(folder, {})
    assert source.classes == ("no", "yes")
    assert source.task == ("instance_segmentation" if polygons else "detection")
    assert Counter(item.split for item in source.items) == {"train": 3, "val": 3}
    assert source.notes == (
        "data.yaml has train: /etc, which is not a folder here",
        "2 images have no text file, so no objects",
    )
    result = annotated(source)
    assert result.labels.tolist() == [1, 0]
    box = [0.25, 0.25, 0.75, 0.75] if polygons else [0.375, 0.25, 0.625, 0.75]
    np.testing.assert_array_equal(result.boxes[0], np.array(box) * [WIDTH, HEIGHT, WIDTH, HEIGHT])
    check(result, height=HEIGHT, width=WIDTH, classes=2, where="x")
    if polygons:
        ring = np.array([0.25, 0.25, 0.75, 0.25, 0.5, 0.75]) * ([WIDTH, HEIGHT] * 3)
        true = reference.decode(reference.frPyObjects([ring.tolist()], HEIGHT, WIDTH))[..., 0]
        np.testing.assert_array_equal(mask_pixels(result, HEIGHT, WIDTH), [true, true])
    empty = annotated(source, 2)
    assert (len(empty.boxes), len(source.files(source.items[2]))) == (0, 1)
    assert len(source.files(source.items[0])) == 2
    assert source.load(source.items[0])[:2] == b"\xff\xd8"


def test_polygons_can_be_read_as_boxes(tmp_path: Path) -> None:
    folder = sample_sources.yolo(tmp_path / "set", polygons=True)
    source = yolo.read(str(folder), {"task": "detection"})
    result = annotated(source)
    assert (source.task, result.masks, len(result.boxes)) == ("detection", None, 2)
    (folder / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert len(annotated(source, 1).boxes) == 1
    source = yolo.read(str(folder), {})
    assert "1 of the first 7 labels are boxes" in " ".join(source.notes)
    with pytest.raises(SampleError, match="line 1 is a box, while others are polygons"):
        check(annotated(source, 1), height=HEIGHT, width=WIDTH, classes=2, where="x")


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "unknown class"),
        ("-1 0.5 0.5 0.1 0.1", "unknown class"),
        ("cat 0.5 0.5 0.1 0.1", "unknown class"),
        ("0.5 0.5 0.5 0.1 0.1", "unknown class"),
        ("9" * 30 + " 0.5 0.5 0.1 0.1", "unknown class"),
        ("0", "unreadable annotation"),
        ("0 0.5 0.5 0.1", "unreadable annotation"),
        ("0 0.5 0.5 0.1 0.1 0.9", "unreadable annotation"),
        ("0 0.5 0.5 0.1 0.1 0.1 0.1 0.1", "unreadable annotation"),
        ("0 nan 0.5 0.1 0.1", "unreadable annotation"),
        ("0 inf 0.5 0.1 0.1", "unreadable annotation"),
        ("0 0_5 0.5 0.1 0.1", "unreadable annotation"),
        ("0 0.5 0.5 0 0.1", "box without area"),
        ("0 0.5 0.5 -0.1 0.1", "box inverted"),
        ("0 0.9 0.5 0.4 0.1", "box outside the image"),
        ("0 16 12 8 8", "box outside the image"),
        ("0 1e300 1 1 1", "box outside the image"),
        ("0 1e999 1 1 1", "box outside the image"),
        ("0 \u0665 0.5 0.1 0.1", "unreadable annotation"),
    ],
)
def test_an_invalid_line_is_rejected_with_its_reason(
    tmp_path: Path, line: str, message: str
) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    (folder / "labels" / "train" / "0.txt").write_text(f"1 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(SampleError, match=r"train/0") as caught:
        check(
            annotated(yolo.read(str(folder), {})),
            height=HEIGHT,
            width=WIDTH,
            classes=2,
            where="images/train/0.jpg",
        )
    assert caught.value.reason == message


def test_boxes_rounded_beyond_the_edge_are_clipped(tmp_path: Path) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    (folder / "labels" / "train" / "0.txt").write_text("0 0.500001 0.5 1.0 1.0\n")
    assert annotated(yolo.read(str(folder), {})).boxes.tolist() == [
        [pytest.approx(0.000032, abs=1e-9), 0, WIDTH, HEIGHT]
    ]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("names: [a, b]", ("a", "b")),
        ("names: {0: a, 1: b}", ("a", "b")),
        ("names:\n  1: b\n  0: a\n", ("a", "b")),
        ("names: [no, 'on', 3]", ("no", "on", "3")),
    ],
)
def test_class_names_are_read_as_text(tmp_path: Path, text: str, classes: tuple[str, ...]) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    (folder / "data.yaml").write_text(text)
    assert yolo.read(str(folder), {}).classes == classes


@pytest.mark.parametrize(
    "text",
    [
        "names: {1: a, 2: b}",
        "names: 3",
        "names: []",
        "nc: 2",
        "[1]",
        "names: [a, a]",
        "names: [a, [b]]",
        "names: [a, '']",
        'names: [a, "\\e[31m"]',
        "names: [",
        "names: &x [a, *x]",
    ],
)
def test_invalid_class_names_are_refused(tmp_path: Path, text: str) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    (folder / "data.yaml").write_text(text)
    with pytest.raises(TesseraError, match=r"data\.yaml"):
        yolo.read(str(folder), {})


def test_class_names_can_be_in_a_text_file_or_an_option(tmp_path: Path) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    (folder / "data.yaml").unlink()
    with pytest.raises(TesseraError, match="has no names of classes"):
        yolo.read(str(folder), {})
    assert yolo.read(str(folder), {"classes": "a, b"}).classes == ("a", "b")
    (folder / "classes.txt").write_text("cat\ndog\n\n")
    assert yolo.read(str(folder), {}).classes == ("cat", "dog")


@pytest.mark.parametrize("before", ["", "./", "../set/", "/home/someone/set/"])
def test_the_yaml_assigns_folders_to_splits(tmp_path: Path, before: str) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    for kind in ("images", "labels"):
        (folder / kind / "train").rename(folder / kind / "first")
        (folder / kind / "val").rename(folder / kind / "train")
    where = f"train: {before}images/first\nval: [{before}images/train]\ntest:\nnames: [a, b]\n"
    (folder / "data.yaml").write_text(where)
    source = yolo.read(str(folder), {})
    assert {(item.origin.split("/")[1], item.split) for item in source.items} == {
        ("first", "train"),
        ("train", "val"),
    }
    (folder / "data.yaml").write_text(where.replace("images/train", "images/first"))
    source = yolo.read(str(folder), {})
    assert "has the same images for train and val (images/first)" in " ".join(source.notes)
    assert Counter(item.split for item in source.items) == {"train": 6}


def test_links_out_of_the_source_are_not_read(tmp_path: Path) -> None:
    folder = sample_sources.yolo(tmp_path / "set")
    secret = tmp_path / "secret.txt"
    secret.write_text("0 0.5 0.5 0.1 0.1\n")
    text = folder / "labels" / "train" / "0.txt"
    text.unlink()
    text.symlink_to(secret)
    with pytest.raises(TesseraError, match="is outside"):
        annotated(yolo.read(str(folder), {}))
