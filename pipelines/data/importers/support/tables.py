"""Tables of images: which column has the paths, which the labels, and what speaks against it.

In: the rows of a table, and an `ImageFinder`. Out: positions of columns. Must not know formats.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Split
from pipelines.data.importers.support.image_finder import ImageFinder
from pipelines.data.importers.support.reading import split_of
from pipelines.data.safe_parsers import read_csv
from pipelines.data.sources import AmbiguousError, Reading, is_image, read_file

PATHS = (
    *("path", "file_path", "filepath", "image_path", "file", "filename", "image", "file_name"),
    *("image_id", "image_name", "imagename", "img", "img_path", "image_file", "imageid", "id"),
)
LABELS = ("label", "class", "category", "target", "class_name", "labels", "classname", "class_id")
SPLITS = ("split", "subset", "partition")
"""Usual names of columns, in lower case."""
_BOX = re.compile(
    r"(x|y)[-_ ]?(min|max|1|2)|(min|max)[-_ ]?(x|y)|bbox.*|box(es)?|left|top|right|bottom"
    r"|bx|by|bw|bh|encoded_?pixels|rle|segmentation|polygon|points|region_shape_attributes",
    re.I,
)
_FLAG = re.compile(r"is[-_ ]?(train|val|test)[a-z]*([-_ ][a-z]+)?", re.I)
_FLAGGED: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
_YES, _NO = frozenset({"1", "1.0", "true"}), frozenset({"0", "0.0", "false"})
_SEPARATORS = ("|", ";", ",", "/", "+", "&", " ")
_SEPARATOR_LINE = re.compile(rb"(?:\xef\xbb\xbf)?sep=([,;|\t])\r?\n", re.I)
"""The line that Excel reads before a header."""
_TRIED = 300


@dataclass(frozen=True)
class Table:
    """The rows of a table. `first` is the number of the first row in the file."""

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    first: int = 2

    def column(self, at: int) -> list[str]:
        return [row[at] for row in self.rows]


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """Reads a CSV or TSV file: UTF-8 or UTF-16, with or without a header. Raises TesseraError for a
    damaged one, and for a row with more or fewer columns than the header."""
    data = read_file(path, path.name)
    listed = parse_rows(data, path.name, delimiter)
    first = 3 if _SEPARATOR_LINE.match(_to_utf8(data[:64])) else 2
    header = tuple(cell.strip() for cell in next(listed, []))
    rows = []
    for number, row in enumerate(listed, first):
        if not row:
            continue
        if len(row) != len(header):
            raise TesseraError(
                f"{path.name}, row {number}: {len(row)} columns, the header has {len(header)}",
                hint="fix the row, or put quotes around text that contains the delimiter",
            )
        rows.append(tuple(cell.strip() for cell in row))
    if any(map(is_image, header)):  # the first row is a row of data
        rows.insert(0, header)
        names = tuple(str(at) for at in range(1, len(header) + 1))
        return Table(path, names, tuple(rows), first - 1)
    return Table(path, header, tuple(rows), first)


def parse_rows(data: bytes, where: str, delimiter: str | None = None) -> Iterator[list[str]]:
    """The rows of a table with its header, from a file in UTF-8 or UTF-16. Raises TesseraError for
    a damaged one."""
    data = _to_utf8(data)
    if match := _SEPARATOR_LINE.match(data):
        data, delimiter = data[match.end() :], delimiter or match[1].decode()
    return read_csv(data, where, delimiter or usual_delimiter(data))


def _to_utf8(data: bytes) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").encode()
    return data


def usual_delimiter(data: bytes) -> str:
    """The comma, semicolon, tab or bar that is most often in the first row."""
    first = data.removeprefix(codecs.BOM_UTF8).split(b"\n", 1)[0].decode("latin-1")
    # The first of equals: a header with one column has no separator.
    return max(",;\t|", key=first.count)


def find_column(table: Table, name: str, option: str) -> int:
    """The position of a column that the user names. Raises UsageError if there is none."""
    names = [cell.lower() for cell in table.header]
    if name.strip().lower() not in names:
        raise UsageError(
            f"{table.path.name} has no column {name.strip()}",
            hint=f"its first row has {', '.join(table.header)[:200] or 'nothing'}: if that is the "
            f"header, give --option {option}=NAME; otherwise add a header",
        )
    return names.index(name.strip().lower())


def usual_column(table: Table, names: Sequence[str]) -> int | None:
    header = [cell.lower() for cell in table.header]
    return next((header.index(name) for name in names if name in header), None)


def find_paths(table: Table, finder: ImageFinder) -> int | None:
    """The column whose values are images: a usual name if its values are found, or the only column
    whose values are."""
    rows = table.rows[:_TRIED]
    fitting = [
        at
        for at in range(len(table.header))
        if rows and 2 * finder.count([row[at] for row in rows], table.path.name) > len(rows)
    ]
    usual = usual_column(table, PATHS)
    if usual in fitting or not fitting:
        return usual if fitting else None
    return fitting[0] if len(fitting) == 1 else None


def find_splits(table: Table, paths: int) -> int | None:
    """The column of splits: one of a usual name, or the only one whose values all mean a split, as
    those of `phase`, train among them. None if there is none."""
    usual = usual_column(table, SPLITS)
    if usual is not None:
        return usual
    fitting = []
    for at, name in enumerate(table.header):
        if at == paths or name.lower() in (*PATHS, *LABELS):
            continue
        words = set(table.column(at)) - {""}
        if len(words) > 1 and all(map(split_of, words)) and "train" in map(split_of, words):
            fitting.append(at)
    return fitting[0] if len(fitting) == 1 else None


def find_flag(table: Table) -> int | None:
    """The column that says by 0 and 1 whether an image is of a split, as `is_train`."""
    for at, name in enumerate(table.header):
        if _FLAG.fullmatch(name):
            values = {value.lower() for value in table.column(at)}
            if len(values) > 1 and values <= _YES | _NO:
                return at
    return None


def flagged_splits(name: str) -> tuple[Split, Split] | None:
    """What 1 and 0 mean in a column of this name: the others of val and test are train, those of
    train are test. None for another column."""
    match = _FLAG.fullmatch(name)
    if match is None:
        return None
    split: Split = _FLAGGED[match[1].lower()]
    return split, "test" if split == "train" else "train"


def split_word(name: str, value: str) -> str:
    """The word for a split in a column of this name: train for a 1 in `is_train`."""
    meant = flagged_splits(name)
    if meant is None or value.lower() not in _YES | _NO:
        return value
    return meant[value.lower() in _NO]


def find_labels(table: Table, paths: int, split: int | None, format: str = "csv") -> int | None:
    """The column of labels: one of a usual name, or the only one that can be. None if no column
    can. Raises AmbiguousError for several."""
    usual = usual_column(table, LABELS)
    usual = None if usual == paths else usual
    few = max(len(table.rows) // 2, 2)
    fitting = []
    for at, name in enumerate(table.header):
        if at in (paths, split) or (usual is not None and name.lower() not in LABELS):
            continue
        values = set(table.column(at))
        if 2 <= len(values - {""}) <= few:
            fitting.append(at)
    if usual is not None:
        others = [at for at in fitting if not _are_same_classes(table, usual, at)]
        if usual not in fitting or not others:
            return usual
    if len(fitting) > 1:
        names = [table.header[at] for at in fitting]
        raise AmbiguousError(
            f"{table.path.name} has images in the column {table.header[paths]}, and labels in one "
            f"of several: {', '.join(names)[:200]}",
            hint="choose one: --option label_column=NAME",
            readings=[
                Reading(
                    format,
                    {"label_column": table.header[at]},
                    f"{len(set(table.column(at)))} classes, as {table.rows[0][at][:40]!r}",
                )
                for at in fitting[:6]
            ],
        )
    return fitting[0] if fitting else None


def _are_same_classes(table: Table, one: int, other: int) -> bool:
    """Whether two columns divide the rows alike, as a number and a name of each class do."""
    pairs = {(row[one], row[other]) for row in table.rows}
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def box_columns(table: Table) -> list[str]:
    """The columns that have boxes or masks: those of a table for another task."""
    return [name for name in table.header if _BOX.fullmatch(name)]


def one_hot_columns(table: Table, without: Sequence[int | None]) -> list[int]:
    """The columns of a table with a column for each class: 1 for the class of the image, else 0."""
    columns = [at for at in range(len(table.header)) if at not in without]
    values = {row[at] for row in table.rows for at in columns}
    if len(columns) < 2 or not values or not values <= {"0", "1", "0.0", "1.0"}:
        return []
    return columns


def one_hot_labels(table: Table, columns: Sequence[int]) -> list[str]:
    """The class of each row; TesseraError for a row with none or several."""
    labels = []
    for number, row in enumerate(table.rows, table.first):
        marked = [table.header[at] for at in columns if row[at].startswith("1")]
        if len(marked) != 1:
            classes = ", ".join(marked) or "none"
            raise TesseraError(
                f"{table.path.name}, row {number} marks {len(marked)} classes ({classes}): an "
                "image has exactly one",
                hint="several labels an image are not supported; keep one label in each row, or "
                "take one column: --option label_column=NAME",
            )
        labels += marked
    return labels


def find_joined(labels: Sequence[str]) -> tuple[str, str] | None:
    """(cell, separator) of a cell with several labels that other cells have alone."""
    known = set(labels)
    for cell in sorted(known):
        for separator in _SEPARATORS:
            parts = [part.strip() for part in cell.split(separator)]
            if len(parts) > 1 and all(part in known for part in parts):
                return cell, separator
    return None


def is_table(path: Path) -> bool:
    return os.path.splitext(path.name)[1].lower() in (".csv", ".tsv") and path.is_file()
