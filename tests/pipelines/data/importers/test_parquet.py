"""Parquet files: the rows, their classes, and the bytes of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from layouts.base import picture
from layouts.folders import parquet as make
from pyarrow import parquet as writer

from models.core.errors import TesseraError
from pipelines.data.importers import parquet
from pipelines.data.sources import AmbiguousError


def write(folder: Path, columns: dict[str, Any], name: str = "train.parquet") -> str:
    writer.write_table(pyarrow.table(columns), folder / name, row_group_size=2)
    return str(folder)


def test_rows_are_read_from_their_row_groups(tmp_path: Path) -> None:
    source = parquet.read(str(make(tmp_path)), {})
    assert [item.split for item in source.items] == ["test"] * 2 + ["train"] * 8 + ["val"] * 2
    row = source.items[7]
    assert (row.origin, row.label) == ("data/train-00000-of-00001.parquet[5]", 1)
    assert source.load(row) == picture(tmp_path / "x.png", 5).read_bytes()
    assert [path.name for path in source.files(row)] == ["train-00000-of-00001.parquet"]


def test_little_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet.read(str(make(tmp_path)), {})
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    data = [source.load(item) for item in source.items]
    assert len(parquet._GROUPS._groups) == 1
    monkeypatch.undo()
    assert [source.load(item) for item in source.items] == data


def test_bytes_and_labels_may_be_plain(tmp_path: Path) -> None:
    data = [picture(tmp_path / "x.png", n).read_bytes() for n in range(4)]
    (tmp_path / "x.png").unlink()
    columns = {"id": [1, 2, 3, 4], "jpg": data, "label": ["b", "a", None, "b"]}
    source = parquet.read(write(tmp_path, columns), {})
    assert (source.classes, source.load(source.items[3])) == (("a", "b"), data[3])
    assert source.items[2].problem == ("missing label", "train.parquet[2] has no label")


def test_what_has_no_images_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"label": [1, 2], "text": ["a", "b"]})
    assert parquet.recognises(folder) == ""
    with pytest.raises(TesseraError, match="no column with the bytes of images"):
        parquet.read(folder, {})
    folder = write(tmp_path, {"image": [{"bytes": None, "path": "x.jpg"}] * 2, "label": [0, 1]})
    source = parquet.read(
        write(tmp_path, {"image": [{"bytes": b"x", "path": "x.jpg"}, None], "label": [0, 1]}), {}
    )
    with pytest.raises(TesseraError, match="only a path"):
        source.load(source.items[1])
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(TesseraError, match=r"train\.parquet can't be read"):
        parquet.read(folder, {})


def test_several_columns_of_images_are_asked_about(tmp_path: Path) -> None:
    """Otherwise the images of all but one would be lost without a message."""
    data = [picture(tmp_path / "x.png", n).read_bytes() for n in range(4)]
    (tmp_path / "x.png").unlink()
    columns = {"left": data[:2], "right": data[2:], "label": ["b", "a"]}
    folder = write(tmp_path, columns)
    with pytest.raises(AmbiguousError, match=r"images in several columns: left, right") as caught:
        parquet.recognises(folder)
    sources = [parquet.read(folder, reading.options) for reading in caught.value.readings]
    assert [source.load(source.items[1]) for source in sources] == [data[1], data[3]]
    assert [source.classes for source in sources] == [("a", "b")] * 2


def test_a_column_of_splits_is_used(tmp_path: Path) -> None:
    data = [picture(tmp_path / "x.png", n).read_bytes() for n in range(3)]
    (tmp_path / "x.png").unlink()
    columns = {"image": data, "label": ["b", "a", "b"], "split": ["train", "test", "other"]}
    items = parquet.read(write(tmp_path, columns, "data.parquet"), {}).items
    assert [item.split for item in items] == ["train", "test", None]
    assert [item.problem and item.problem[0] for item in items] == [None, None, "unknown split"]
