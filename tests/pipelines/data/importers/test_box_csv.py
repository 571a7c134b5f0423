"""Tables of boxes: usual columns, corners or sizes, pixels or shares, one table or several."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from layouts.base import text
from layouts.box_files import HEIGHT, NAMES, WIDTH, box
from layouts.box_sets import COUNT, images, splits
from layouts.more_boxes import bbox_row, open_images, retinanet_row, table, tensorflow_row

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Objects, check
from pipelines.data.importers import box_csv
from pipelines.data.packing.formats import recognise
from pipelines.data.sources import Source

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


def annotated(source: Source, row: int = 0) -> Objects:
    assert source.annotate is not None
    found = source.annotate(source.items[row])
    assert isinstance(found, Objects)
    return found


def sized_row(number: int, order: str = "{n}.jpg,{c},{x},{y},{w},{h}") -> str:
    x, y, w, h = box(number)
    return order.format(n=number, c=NAMES[number % 2], x=x, y=y, w=w, h=h, r=x + w, b=y + h)


TABLES = {
    "TensorFlow": (HEADER, tensorflow_row),
    "RetinaNet": ("", retinanet_row),
    "bbox": ("image_id,width,height,bbox,class\n", bbox_row),
    "x, y, w, h": ("image,label,x,y,w,h\n", sized_row),
    "x, y, width, height": ("image,label,x,y,width,height\n", sized_row),
    "x1, y1, x2, y2": (
        "Image_ID,X1,Y1,X2,Y2,Category\n",
        partial(sized_row, order="{n},{x},{y},{r},{b},{c}"),
    ),
    "semicolons": (
        "path;left;top;right;bottom;class\n",
        partial(sized_row, order="a/{n}.jpg;{x},0;{y},0;{r},0;{b},0;{c}"),
    ),
    "tabs, CRLF and a byte order mark": (
        "\ufefffilename\tclass\txmin\tymin\txmax\tymax\r\n",
        partial(sized_row, order="{n}.jpg\t{c}\t{x}\t{y}\t{r}\t{b}\r"),
    ),
}


@pytest.mark.parametrize("name", list(TABLES))
def test_usual_tables_are_read(tmp_path: Path, name: str) -> None:
    header, row = TABLES[name]
    table(header, row, "labels.csv", "photos/{}.jpg", tmp_path)
    assert recognise(str(tmp_path)) == ("box_csv", "boxes in labels.csv")
    source = box_csv.read(str(tmp_path), {})
    assert (source.task, source.classes) == ("detection", ("blue", "red"))
    assert not any(item.problem for item in source.items)
    for at in range(COUNT):
        left, top, width, height = box(at)
        found = annotated(source, at)
        check(found, height=HEIGHT, width=WIDTH, classes=2, where="x")
        assert found.boxes.tolist() == [[left, top, left + width, top + height]]
        assert source.classes[found.labels[0]] == NAMES[at % 2]


def test_open_images_has_codes_shares_and_groups(tmp_path: Path) -> None:
    open_images(tmp_path)
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_text(path.read_text().replace(",0,0\n", ",0,1\n", 1))
    source = box_csv.read(str(tmp_path), {})
    assert source.classes == ("blue", "red")
    assert Counter(item.split for item in source.items) == {"train": 4, "val": 2}
    assert [annotated(source, row).crowd.tolist() for row in range(3)] == [[True], [False], [False]]
    left, top, width, height = box(0)
    assert annotated(source).boxes[0].tolist() == pytest.approx(
        [left, top, left + width, top + height]
    )
    assert tmp_path / "class-descriptions-boxable.csv" in source.shared_files


def test_tables_for_each_split_and_a_column_of_splits(tmp_path: Path) -> None:
    for split, numbers in splits():
        images(tmp_path / "a", "images/{}.jpg", numbers)
        rows = "".join(tensorflow_row(number) + "\n" for number in numbers)
        text(tmp_path / "a" / f"{split}_labels.csv", HEADER + rows)
    source = box_csv.read(str(tmp_path / "a"), {})
    assert Counter(item.split for item in source.items) == {"train": 3, "val": 2, "test": 1}
    table(
        f"split,{HEADER}",
        lambda n: f"{('train', 'valid')[n % 2]},{tensorflow_row(n)}",
        "a.csv",
        "{}.jpg",
        tmp_path / "b",
    )
    source = box_csv.read(str(tmp_path / "b"), {})
    assert [item.split for item in source.items] == ["train", "val"] * 3
    text(tmp_path / "a" / "more.csv", HEADER + tensorflow_row(0) + "\n")
    with pytest.raises(TesseraError, match=r"images/0\.jpg is in .* and in "):
        box_csv.read(str(tmp_path / "a"), {})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("train", "val"), None),
        (("train", "holdout"), "unknown split"),
        (("train", "train", "val"), "several splits"),
    ],
)
def test_a_split_that_is_not_clear_is_rejected(
    tmp_path: Path, words: tuple[str, ...], problem: str | None
) -> None:
    images(tmp_path, "{}.jpg", range(2))
    rows = [f"{word},{tensorflow_row(n % 2)}\n" for n, word in enumerate(words)]
    text(tmp_path / "a.csv", f"split,{HEADER}" + "".join(rows))
    items = box_csv.read(str(tmp_path), {}).items
    assert {item.problem[0] for item in items if item.problem} == ({problem} if problem else set())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0.jpg,24,16,red,a,1,2,3", "unreadable annotation"),
        ("0.jpg,24,16,red,1,,2,3", "unreadable annotation"),
        ("0.jpg,24,16,,1,1,2,3", "unknown class"),
        ("0.jpg,24,16,red,inf,1,2,3", "unreadable annotation"),
    ],
)
def test_a_damaged_row_is_a_damaged_object(tmp_path: Path, row: str, reason: str) -> None:
    table(HEADER, tensorflow_row, "a.csv", "{}.jpg", tmp_path)
    path = tmp_path / "a.csv"
    path.write_text(f"{path.read_text()}{row}\n")
    found = annotated(box_csv.read(str(tmp_path), {}))
    assert len(found.boxes) == 1
    assert [(d.reason, f"row {COUNT + 2}" in d.message) for d in found.damaged] == [(reason, True)]


def test_a_row_without_a_box_is_an_image_without_objects(tmp_path: Path) -> None:
    table(HEADER, lambda n: tensorflow_row(n) if n else "0.jpg,,,,,,,", "a.csv", "{}.jpg", tmp_path)
    source = box_csv.read(str(tmp_path), {})
    assert [len(annotated(source, row).boxes) for row in (0, 1)] == [0, 1]


def test_a_row_without_an_image_is_an_orphan(tmp_path: Path) -> None:
    table(
        HEADER,
        lambda n: tensorflow_row(n) if n else ",24,16,red,1,1,5,5",
        "a.csv",
        "{}.jpg",
        tmp_path,
    )
    source = box_csv.read(str(tmp_path), {})
    assert source.orphans == (("annotation without image", "a.csv, row 2 has no image"),)


def test_missing_images_are_rejected_or_skipped(tmp_path: Path) -> None:
    table(HEADER, tensorflow_row, "a.csv", "{}.jpg", tmp_path)
    (tmp_path / "3.jpg").unlink()
    source = box_csv.read(str(tmp_path), {})
    assert [item.origin for item in source.items if item.problem] == ["3.jpg"]
    source = box_csv.read(str(tmp_path), {"missing": "skip"})
    assert len(source.items) == COUNT - 1
    assert "1 images are not here" in source.notes[0]


def test_one_class_may_be_named_by_an_option(tmp_path: Path) -> None:
    table("image_id,x1,y1,x2,y2\n", lambda n: f"{n},1,2,5,6", "a.csv", "{}.jpg", tmp_path)
    with pytest.raises(UsageError, match="no column of classes"):
        box_csv.read(str(tmp_path), {})
    assert box_csv.read(str(tmp_path), {"classes": "wheat"}).classes == ("wheat",)


@pytest.mark.parametrize(
    "header",
    ["image,label", "image,label,x,y", "image,label,left,right", "class,xmin,ymin,xmax,ymax"],
)
def test_other_tables_are_not_boxes(tmp_path: Path, header: str) -> None:
    count = header.count(",")
    table(f"{header}\n", lambda n: f"{n}.jpg" + ",1" * count, "a.csv", "{}.jpg", tmp_path)
    assert not box_csv.recognises(str(tmp_path))
