"""A table of paths and labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_sources

from models.core.errors import TesseraError, UsageError
from pipelines.data import sources
from pipelines.data.importers import csv
from pipelines.data.sources import AmbiguousError


def test_a_table_is_read(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    assert csv.recognises(str(folder)) == "paths and labels in labels.csv (columns Path and Label)"
    for source in (csv.read(str(folder), {}), csv.read(str(folder / "labels.csv"), {})):
        assert (source.name, source.task, source.classes) == (
            "set",
            "classification",
            ("cat", "dog"),
        )
        assert [item.label for item in source.items] == [0, 1, 0, 1, 0, 1]
        assert [item.split for item in source.items] == ["train", "val", None] * 2
        assert source.items[1].key == "photos/1"
        assert source.load(source.items[1]) == (folder / "photos" / "1.jpg").read_bytes()
        assert [path.name for path in source.files(source.items[1])] == ["1.jpg", "labels.csv"]


@pytest.mark.fault(8, 29)
def test_invalid_rows_are_rejected(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    sample_sources.image(tmp_path / "secret.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    rows = [
        ("photos/0.jpg,cat,train", ""),
        ("photos/9.jpg,cat,train", "missing image"),
        ("../secret.jpg,cat,train", "path outside the source"),
        (f"{tmp_path}/secret.jpg,cat,train", "path outside the source"),
        ("photos/../../secret.jpg,cat,train", "path outside the source"),
        ("photos/1.jpg,,train", "missing label"),
        ("photos/2.jpg,cat,fold9", "unknown split"),
        (",cat,train", "path outside the source"),
        ("a\0b,cat,train", "path outside the source"),
        (f"{'x' * 5000}.jpg,cat,train", "missing image"),
        ("link.jpg,cat,train", ""),
    ]
    text = "\n".join(["path,label,split", *(row for row, _ in rows)])
    (folder / "labels.csv").write_text(text)
    source = csv.read(str(folder), {})
    result = [item.problem[0] if item.problem else "" for item in source.items]
    assert result == [problem for _, problem in rows]
    assert [item.row for item in source.items] == list(range(2, 2 + len(rows)))
    with pytest.raises(TesseraError, match="is outside"):
        source.load(source.items[-1])


def test_columns_delimiter_and_folder_can_be_set(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    (folder / "labels.csv").unlink()
    text = "id;breed;owner;fold\n0.jpg;10;x;train\n1.jpg;9;y;test\n"
    (folder / "my.csv").write_text(text)
    with pytest.raises(AmbiguousError, match="labels in one of several: breed, owner"):
        csv.recognises(str(folder))
    options = {
        "path_column": "id",
        "label_column": "breed",
        "split_column": "FOLD",
        "delimiter": ";",
        "images": "photos",
    }
    source = csv.read(str(folder), options)
    assert source.classes == ("9", "10")
    assert [(i.label, i.split, i.problem) for i in source.items] == [
        (1, "train", None),
        (0, "test", None),
    ]
    (folder / "my.csv").write_text(text.replace(";", "\t"))
    assert len(csv.read(str(folder), {**options, "delimiter": "tab"}).items) == 2
    del options["delimiter"]  # the header tells
    assert len(csv.read(str(folder), options).items) == 2
    for name, value in (("delimiter", ""), ("delimiter", "::"), ("images", "none")):
        with pytest.raises(UsageError, match=f"option {name}"):
            csv.read(str(folder), {**options, name: value})
    with pytest.raises(UsageError, match=r"no column name.*give --option path_column"):
        csv.read(str(folder), {**options, "delimiter": "tab", "path_column": "name"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has no column path"),
        (b"path,label\n", "no labelled images"),
        (b"path,label\na.jpg,x,y\n", "row 2: 3 columns"),
        (b"path,label\na.jpg,\n", "no labelled images"),
        (b'path,label\n"a.jpg,x', "can't be read"),
        (b"path,label\n\xff.jpg,x\n", "is not UTF-8"),
        (b"path,label\na.jpg,\x1b[31m\n", "can't be printed"),
    ],
)
def test_an_invalid_table_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(TesseraError, match=message):
        csv.read(str(tmp_path), {})


def test_two_tables_are_refused(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    (folder / "more.csv").write_bytes((folder / "labels.csv").read_bytes())
    assert not csv.recognises(str(folder))
    with pytest.raises(TesseraError, match="has 2 tables"):
        csv.read(str(folder), {})


def test_an_image_with_two_labels_is_rejected(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    with (folder / "labels.csv").open("a") as file:
        file.write("photos/1.jpg,cat,train\nphotos\\0.jpg,cat,train\n")
    source = csv.read(str(folder), {})
    problems = {item.row: item.problem[0] for item in source.items if item.problem}
    assert problems == {3: "several labels", 8: "several labels"}
    assert source.items[7].key == source.items[0].key  # and is a duplicate


def test_a_table_of_boxes_is_no_table_of_classes(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace("Split", "xmin"))
    for call in (lambda: csv.recognises(str(folder)), lambda: csv.read(str(folder), {})):
        with pytest.raises(UsageError, match=r"boxes or masks in the columns xmin"):
            call()
    assert csv.read(str(folder), {"task": "classification"}).classes == ("cat", "dog")


def test_tables_of_the_splits_are_joined(tmp_path: Path) -> None:
    folder = sample_sources.table(tmp_path / "set")
    head, *rows = (folder / "labels.csv").read_text().replace("Split", "Fold").splitlines()
    rows = [row.rpartition(",")[0] + ",1" for row in rows]
    (folder / "labels.csv").unlink()
    for name, part in (("train", rows[:4]), ("valid", rows[4:])):
        (folder / f"{name}.csv").write_text("\n".join([head, *part]))
    source = csv.read(str(folder), {"label_column": "label"})
    assert [item.split for item in source.items] == ["train"] * 4 + ["val"] * 2
    assert len(source.shared_files) == 2
    (folder / "other.csv").write_text("\n".join([head, *rows]))  # no split: which is meant?
    with pytest.raises(TesseraError, match="has 3 tables"):
        csv.read(str(folder), {"label_column": "label"})


def test_the_images_of_a_source_are_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tables it has: listing a million images takes seconds."""
    folder = sample_sources.table(tmp_path / "set")
    head, *rows = (folder / "labels.csv").read_text().splitlines()
    (folder / "labels.csv").unlink()
    for name, part in (("train", rows[:2]), ("valid", rows[2:4]), ("test", rows[4:])):
        (folder / f"{name}.csv").write_text("\n".join([head, *part]))
    listed = []

    def find_images(root: Path) -> Iterator[str]:
        listed.append(root)
        return sources.find_images(root)

    monkeypatch.setattr(csv, "find_images", find_images)
    assert csv.recognises(str(folder))
    assert len(csv.read(str(folder), {}).items) == len(rows)
    assert listed == [folder, folder]


def test_a_flag_of_a_split_is_asked_about(tmp_path: Path) -> None:
    """Otherwise other splits would be made than those that the table has."""
    folder = sample_sources.table(tmp_path / "set")
    head, *rows = (folder / "labels.csv").read_text().replace("Split", "is_train").splitlines()
    cells = [row.split(",") for row in rows]
    at = head.split(",").index("is_train")
    for number, row in enumerate(cells):
        row[at] = str(int(number < 4))
    (folder / "labels.csv").write_text("\n".join([head, *map(",".join, cells)]))
    with pytest.raises(AmbiguousError, match="a column is_train of 1 and 0") as caught:
        csv.recognises(str(folder))
    splits = [
        [item.split for item in csv.read(str(folder), reading.options).items]
        for reading in caught.value.readings
    ]
    assert splits == [["train"] * 4 + ["test"] * 2, [None] * 6]
