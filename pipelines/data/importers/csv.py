"""A table of images: a CSV file with a path and a label in each row, and optionally a split.

In: a folder with one such file, or one for each split (train.csv, test.csv, train/labels.csv), or
the file itself. Out: a `Source` for classification. Paths are those of files relative to the
table's folder or to the option `images`, or names and ids of images in one folder below it. Classes
are the labels in alphabetical order, or in numerical order if all are integers; or the columns of a
table that has a column of 0 and 1 for each class. A row without a label, with an unknown split, or
with a file that is missing or outside the source is rejected.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Split
from pipelines.data.importers.support import tables
from pipelines.data.importers.support.image_finder import ImageFinder
from pipelines.data.importers.support.reading import choose, find_splits, load, make_keys, split_of
from pipelines.data.importers.support.tables import Table, read_table
from pipelines.data.sources import (
    AmbiguousError,
    Item,
    Reading,
    Source,
    find_folders,
    find_images,
)

NAME = "csv"
OPTIONS: Mapping[str, str] = {
    "path_column": "column with the paths of the images",
    "label_column": "column with the labels",
    "split_column": "column with train, val or test, or of a name as is_train with 1 and 0; empty "
    "for no split",
    "delimiter": "column separator; by default the comma, semicolon, tab or bar of the header",
    "images": "folder that paths are relative to",
    "cells": "single: each cell is one class, even if it looks like several",
    "task": "classification reads only the classes of a table that also has boxes",
}


class _Row(NamedTuple):
    """A row of a table: path and label as they are written, and the row's number in its file."""

    name: str
    label: str
    split: Split | None
    problem: tuple[str, str] | None
    number: int


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.exists():
        return ""
    listed = _tables(folder)
    if not listed:
        return ""
    root = folder.parent if folder.is_file() else folder
    found = _fitting(listed, {}, root, ImageFinder(root, find_images(root)))
    shown = [
        path.name if folder.is_file() else path.relative_to(folder).as_posix() for path in found
    ]
    columns = f" (columns {' and '.join(next(iter(found.values())))})" if found else ""
    return f"paths and labels in {', '.join(shown)}{columns}" if found else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the tables. Raises TesseraError for a damaged one, UsageError for unknown columns,
    AmbiguousError if several columns could be the labels."""
    place = Path(source)
    folder = place.parent if place.is_file() else place
    root = folder / options.get("images", "")
    if not root.is_dir():
        raise UsageError(f"the option images: there is no folder {root}")
    images = ImageFinder(root, find_images(root))
    files = _choose(place, folder, options, images)
    rows: list[_Row] = []
    found: list[tuple[str, tuple[str, str] | None]] = []
    for path, split in files:
        table = read_table(path, _delimiter(options))
        finder = images if "images" in options else images.beside(_near(path, folder))
        new = _rows(table, finder, options, split)
        rows += new
        found += finder.find_all([row.name for row in new], path.name)
    classes = _classes([row.label for row in rows], files[0][0].name, options)
    if not rows or not classes:
        raise TesseraError(f"{files[0][0].name} has no labelled images")
    return Source(
        name=folder.resolve().name,
        task="classification",
        classes=classes,
        items=_items(rows, found, classes),
        load=partial(load, root),
        files=partial(_files, root, tuple(path for path, _ in files)),
        folder=None if place.is_file() else folder,
        shared_files=tuple(path for path, _ in files),
    )


def _items(
    rows: Sequence[_Row],
    found: Sequence[tuple[str, tuple[str, str] | None]],
    classes: Sequence[str],
) -> list[Item]:
    numbers = {name: number for number, name in enumerate(classes)}
    unique = list(dict.fromkeys(path for path, _ in found))
    keys = dict(zip(unique, make_keys(unique)))
    labels: dict[str, set[str]] = {}
    for row, (path, _) in zip(rows, found):
        labels.setdefault(path, set()).add(row.label)
    items = []
    for row, (path, problem) in zip(rows, found):
        problem = row.problem or problem
        if not problem and len(labels[path]) > 1:
            several = ", ".join(sorted(labels[path]))
            problem = ("several labels", f"{path} has the labels {several}, as in row {row.number}")
        label = numbers.get(row.label)
        items.append(Item(keys[path], path, label, row.split, row.number, problem))
    return items


def _files(root: Path, used: tuple[Path, ...], item: Item) -> tuple[Path, ...]:
    return (root / item.origin, *used)


def _tables(place: Path) -> list[tuple[Path, Split | None]]:
    """The tables of a source, each with the split in its name or in that of its folder: those in
    the folder itself, or else those in the folders in it."""
    if place.is_file():
        return [(place, None)] if tables.is_table(place) else []
    for folders in ([place], find_folders(place)):
        paths = [
            path for folder in folders for path in sorted(folder.iterdir()) if tables.is_table(path)
        ]
        if paths:
            names = [path.stem if path.parent == place else path.parent.name for path in paths]
            splits = find_splits(names)
            return [(path, splits.get(name)) for path, name in zip(paths, names)]
    return []


def _near(path: Path, root: Path) -> str:
    """The folder of a table, relative to the source; empty for the source itself."""
    near = path.parent.relative_to(root).as_posix()
    return "" if near == "." else near


def _fitting(
    listed: Sequence[tuple[Path, Split | None]],
    options: Mapping[str, str],
    root: Path,
    images: ImageFinder,
) -> dict[Path, list[str]]:
    """The tables that have images and labels, with the names of these columns: one, or several
    that are the splits."""
    found = {
        path: _used_columns(path, images.beside(_near(path, root)), options) for path, _ in listed
    }
    fitting = {path: columns for path, columns in found.items() if columns}
    splits = [split for path, split in listed if path in fitting]
    if len(splits) > 1 and (None in splits or "train" not in splits):
        return {}
    return fitting


def _choose(
    place: Path, folder: Path, options: Mapping[str, str], images: ImageFinder
) -> list[tuple[Path, Split | None]]:
    tables_of_source = listed = _tables(place)
    if len(listed) > 1:
        fitting = _fitting(listed, options, folder, images)
        listed = [(path, split) for path, split in listed if path in fitting]
    if not listed:
        raise TesseraError(
            f"{place} has {len(tables_of_source) or 'no'} tables of images",
            hint="give the file itself, as SOURCE: "
            + ", ".join(str(path) for path, _ in tables_of_source[:3]),
        )
    return listed if len(listed) > 1 else [(listed[0][0], None)]


def _used_columns(path: Path, finder: ImageFinder, options: Mapping[str, str]) -> list[str]:
    """The names of the columns of images and labels; empty if a table hasn't both. Raises
    UsageError for a table of boxes, AmbiguousError if several columns could be the labels."""
    try:
        table = read_table(path, _delimiter(options))
        if "path_column" not in options and tables.find_paths(table, finder) is None:
            return []
    except TesseraError:
        return []
    _check_boxes(table, options)
    try:
        at, label, _ = _columns(table, finder, options)
    except AmbiguousError:
        raise
    except UsageError:
        return []
    return [table.header[at], table.header[label] if label is not None else "one for each class"]


def _delimiter(options: Mapping[str, str]) -> str | None:
    given = options.get("delimiter")
    if given is None:
        return None
    given = {"tab": "\t", "\\t": "\t"}.get(given, given)
    if len(given) != 1 or given in '\r\n"':
        raise UsageError(f"the option delimiter can't be {given!r}", hint="give one character")
    return given


def _rows(
    table: Table, finder: ImageFinder, options: Mapping[str, str], split: Split | None
) -> list[_Row]:
    _check_boxes(table, options)
    at, label_at, split_at = _columns(table, finder, options)
    if label_at is None:
        labels = tables.one_hot_labels(table, tables.one_hot_columns(table, [at, split_at]))
    else:
        labels = [unicodedata.normalize("NFC", row[label_at]) for row in table.rows]
    rows = []
    for number, (cells, label) in enumerate(zip(table.rows, labels), table.first):
        word = ""
        if split_at is not None:
            word = tables.split_word(table.header[split_at], cells[split_at])
        problem = None
        if not label:
            problem = ("missing label", f"row {number} ({cells[at]!r}) has no label")
        elif word and not split_of(word):
            problem = ("unknown split", f"row {number} ({cells[at]!r}) has the split {word!r}")
        rows.append(_Row(cells[at], label, split_of(word) or split, problem, number))
    return rows


def _columns(
    table: Table, finder: ImageFinder, options: Mapping[str, str]
) -> tuple[int, int | None, int | None]:
    """Positions of path, label and split in a row; no label for a column for each class."""
    at = _given(table, options, "path_column")
    split = _given(table, options, "split_column") if options.get("split_column") else None
    label = _given(table, options, "label_column")
    if at is None:
        at = tables.find_paths(table, finder)
    if at is None:
        at = tables.usual_column(table, tables.PATHS)
    if at is None:
        raise _no_column(table, "path_column", tables.PATHS)
    if "split_column" not in options:
        split = tables.find_splits(table, at)
        if split is None:
            _ask_about_flag(table, options)
    if label is None and not tables.one_hot_columns(table, [at, split]):
        label = tables.find_labels(table, at, split)
        if label is None:
            raise _no_column(table, "label_column", tables.LABELS)
    return at, label, split


def _ask_about_flag(table: Table, options: Mapping[str, str]) -> None:
    at = tables.find_flag(table)
    if at is None:
        return
    name = table.header[at]
    yes, no = tables.flagged_splits(name) or ("", "")
    raise AmbiguousError(
        f"{table.path.name} has a column {name} of 1 and 0, which could be splits",
        hint=f"--option split_column={name}, or empty for no splits",
        readings=[
            Reading(NAME, {**options, "split_column": name}, f"1 is {yes}, 0 is {no}"),
            Reading(NAME, {**options, "split_column": ""}, "the column is passed over"),
        ],
    )


def _check_boxes(table: Table, options: Mapping[str, str]) -> None:
    boxes = tables.box_columns(table)
    if boxes and choose(options, "task", ("", "classification"), "") != "classification":
        raise UsageError(
            f"{table.path.name} has boxes or masks in the columns {', '.join(boxes)[:200]}, which "
            "a table of classes has not",
            hint="to read only the classes: --format csv --option task=classification; "
            "for the boxes: --format box_csv",
        )


def _given(table: Table, options: Mapping[str, str], option: str) -> int | None:
    return tables.find_column(table, options[option], option) if option in options else None


def _no_column(table: Table, option: str, usual: Sequence[str]) -> UsageError:
    shown = ", ".join(table.header)[:200] or "nothing"
    return UsageError(
        f"{table.path.name} has no column {' or '.join(usual[:6])}",
        hint=f"its first row has {shown}: if that is the header, give --option {option}=NAME; "
        "otherwise add a header",
    )


def _classes(labels: Sequence[str], where: str, options: Mapping[str, str]) -> tuple[str, ...]:
    found = {label for label in labels if label}
    if unprintable := next((label for label in found if not label.isprintable()), None):
        raise TesseraError(f"the label {unprintable[:100]!r} can't be printed")
    single = choose(options, "cells", ("", "single"), "") == "single"
    if not single and (joined := tables.find_joined(labels)):
        raise TesseraError(
            f"{where}: {joined[0]!r} is several labels with {joined[1]!r} between them, and an "
            "image has exactly one",
            hint="several labels an image are not supported; if each cell is one class: --option "
            "cells=single",
        )
    if all(label.isascii() and label.isdigit() and len(label) < 10 for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found))
