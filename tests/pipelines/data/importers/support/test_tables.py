"""Columns of tables are recognised by their values, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.data.importers.support import tables
from pipelines.data.importers.support.image_finder import ImageFinder
from pipelines.data.importers.support.tables import Table, read_table
from pipelines.data.sources import AmbiguousError


def made(tmp_path: Path, text: str, encoding: str = "utf-8") -> Table:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    return read_table(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_tables_of_every_program_are_read(
    tmp_path: Path, delimiter: str, end: str, encoding: str
) -> None:
    rows = [["path", "label"], ["1.jpg", "é\u2028x"], ["2.jpg", "0,5"]]
    quoted = [[f'"{cell}"' if "," in cell else cell for cell in row] for row in rows]
    text = end.join(delimiter.join(row) for row in quoted) + end
    table = made(tmp_path, ("\ufeff" if encoding == "utf-16-be" else "") + text, encoding)
    assert table.header == ("path", "label")
    assert table.rows == tuple(map(tuple, rows[1:]))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_excel_s_line_for_the_separator_is_no_header(tmp_path: Path, encoding: str) -> None:
    table = made(tmp_path, "sep=;\r\npath;label\r\n1,5.jpg;a,b\r\n2.jpg;c\r\n", encoding)
    assert (table.header, table.rows[0]) == (("path", "label"), ("1,5.jpg", "a,b"))
    assert table.first == 3  # so messages name the right row
    with pytest.raises(TesseraError, match="row 4: 1 columns"):
        made(tmp_path, "sep=;\npath;label\n1.jpg;a\n2.jpg\n", encoding)


def test_a_first_row_of_data_is_no_header(tmp_path: Path) -> None:
    table = made(tmp_path, "1.jpg,cat\n2.jpg,dog\n")
    assert (table.header, table.first, len(table.rows)) == (("1", "2"), 1, 2)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("filename,width,height,class,xmin,ymin,xmax,ymax", ["xmin", "ymin", "xmax", "ymax"]),
        ("ImageID,LabelName,XMin,XMax", ["XMin", "XMax"]),
        ("image,x1,y1,x2,y2,label", ["x1", "y1", "x2", "y2"]),
        ("image_id,bbox,label", ["bbox"]),
        ("ImageId,EncodedPixels", ["EncodedPixels"]),
        ("path,label,width,height,index", []),
    ],
)
def test_columns_of_boxes_are_seen(tmp_path: Path, header: str, found: list[str]) -> None:
    assert tables.box_columns(made(tmp_path, f"{header}\n")) == found


def test_paths_and_labels_are_found_by_their_values(tmp_path: Path) -> None:
    finder = ImageFinder(tmp_path, ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    table = made(tmp_path, "key,datei,art\n7,1.jpg,a\n8,2.jpg,b\n9,3.jpg,a\n6,4.jpg,b\n")
    assert tables.find_paths(table, finder) == 1
    assert tables.find_labels(table, 1, None) == 2
    assert tables.find_paths(table, ImageFinder(tmp_path, ["9.jpg"])) is None  # the control
    table = made(tmp_path, "datei,a,b\n1.jpg,x,p\n2.jpg,y,q\n3.jpg,x,q\n4.jpg,y,q\n")
    with pytest.raises(AmbiguousError, match="one of several: a, b") as caught:
        tables.find_labels(table, 0, None)
    assert [dict(r.options) for r in caught.value.readings] == [
        {"label_column": "a"},
        {"label_column": "b"},
    ]


def test_a_column_for_each_class(tmp_path: Path) -> None:
    table = made(tmp_path, "image,cat,dog\n1,1,0\n2,0.0,1.0\n")
    columns = tables.one_hot_columns(table, [0])
    assert tables.one_hot_labels(table, columns) == ["cat", "dog"]
    assert tables.one_hot_columns(made(tmp_path, "image,cat,dog\n1,1,0\n2,0,7\n"), [0]) == []
    for cells, classes in (("1,1", "cat, dog"), ("0,0", "none")):
        table = made(tmp_path, f"image,cat,dog\n1,{cells}\n2,0,1\n")
        with pytest.raises(TesseraError, match=rf"row 2 marks \d classes \({classes}\)"):
            tables.one_hot_labels(table, [1, 2])


@pytest.mark.parametrize(
    ("labels", "joined"),
    [
        (["cat", "dog", "cat|dog"], ("cat|dog", "|")),
        (["cat", "dog", "dog, cat"], ("dog, cat", ",")),
        (["scab", "rust", "scab rust"], ("scab rust", " ")),
        (["New York", "Rome", "New"], None),
        (["a/b", "c/d"], None),
    ],
)
def test_cells_with_several_labels(labels: list[str], joined: tuple[str, str] | None) -> None:
    assert tables.find_joined(labels) == joined


def test_two_columns_of_usual_names_are_asked_about_if_they_differ(tmp_path: Path) -> None:
    """As the class and the order of animals; a number and a name of each class are the same."""
    rows = ["1.jpg,cat,pet,0", "2.jpg,dog,pet,1", "3.jpg,cow,farm,2"] * 2
    differ = made(tmp_path, "\n".join(["path,class,category,class_id", *rows]))
    with pytest.raises(AmbiguousError, match="one of several: class, category, class_id"):
        tables.find_labels(differ, 0, None)
    alike = [",".join((row.split(",")[0], *row.split(",")[1::2])) for row in rows]
    table = made(tmp_path, "\n".join(["path,class,class_id", *alike]))
    assert tables.find_labels(table, 0, None) == 1


@pytest.mark.parametrize(
    ("header", "values", "found"),
    [
        ("path,label,split", ("train", "held out"), 2),  # a usual name, whatever is in it
        ("path,label,phase", ("train", "val"), 2),
        ("path,Usage,label", ("Training", "Testing"), 1),
        ("path,label,phase", ("train", "other"), None),
        ("path,label,phase", ("val", "test"), None),
        ("path,class,label", ("train", "test"), None),  # of classes, such as vehicles
        ("path,x,y", ("train", "test"), None),  # which one?
    ],
)
def test_a_column_of_splits_is_known_by_its_values(
    tmp_path: Path, header: str, values: tuple[str, str], found: int | None
) -> None:
    columns = header.split(",")
    free = [name for name in columns if name not in ("path", "label")]
    rows = [
        ",".join(word if name in free else f"{at}{name}" for name in columns)
        for at, word in enumerate(values * 2)
    ]
    assert tables.find_splits(made(tmp_path, "\n".join([header, *rows])), 0) == found


@pytest.mark.parametrize(
    ("name", "one", "zero"),
    [
        ("is_train", "train", "test"),
        ("isTrain", "train", "test"),
        ("is_training_image", "train", "test"),
        ("is_test", "test", "train"),
        ("Is Validation", "val", "train"),
    ],
)
def test_a_column_of_flags_names_two_splits(tmp_path: Path, name: str, one: str, zero: str) -> None:
    table = made(tmp_path, f"path,label,{name}\n1.jpg,a,1\n2.jpg,b,0\n")
    assert tables.find_flag(table) == 2
    words = [tables.split_word(name, value) for value in ("1", "True", "0", "false", "val")]
    assert words == [one, one, zero, zero, "val"]
    assert tables.find_flag(made(tmp_path, f"path,{name}\n1.jpg,1\n2.jpg,2\n")) is None
    assert tables.find_flag(made(tmp_path, "path,train\n1.jpg,1\n2.jpg,0\n")) is None
