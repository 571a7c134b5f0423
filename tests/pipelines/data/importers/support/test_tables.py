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
