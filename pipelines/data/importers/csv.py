"""A table of images: a CSV file with a path and a label in each row, and optionally a split.

In: a folder with one such file, or the file itself; paths are relative to its folder, or to the
option `images`. Out: a `Source` for classification. Classes are the labels in alphabetical order,
or in numerical order if all are integers. A row without a label, with an unknown split, or with a
file that is missing or outside the source is rejected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.reading import find_problem, load, split_of
from pipelines.data.safe_parsers import read_csv
from pipelines.data.sources import Item, Source, is_image, read_file

NAME = "csv"
OPTIONS: Mapping[str, str] = {
    "path_column": "column with the paths of the images",
    "label_column": "column with the labels",
    "split_column": "column with train, val or test",
    "delimiter": "column separator; by default the comma, semicolon or tab of the header",
    "images": "folder that paths are relative to",
}
_COLUMNS = {
    "path_column": ("path", "file_path", "filepath", "image_path", "file", "filename", "image"),
    "label_column": ("label", "class", "category", "target", "class_name"),
    "split_column": ("split", "subset", "partition"),
}
_HEAD_BYTES = 64 << 10


def recognises(source: str) -> str:
    files = [path for path in _tables(Path(source)) if _fits(path)]
    return f"paths and labels in {files[0].name}" if len(files) == 1 else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the table. Raises TesseraError for a damaged one, UsageError for unknown columns."""
    path = _table(source)
    root = path.parent / options.get("images", "")
    if not root.is_dir():
        raise UsageError(f"the option images: there is no folder {root}")
    data = read_file(path, path.name)
    rows = read_csv(data, path.name, _delimiter(path, options))
    header = next(rows, [])
    at, label_at, split_at = _columns(header, options, path.name)
    listed: list[tuple[str, str, str]] = []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) != len(header):
            raise TesseraError(
                f"{path.name}, row {number}: {len(row)} columns, the header has {len(header)}",
                hint="fix the row, or put quotes around text that contains the delimiter",
            )
        split = row[split_at].strip() if split_at is not None else ""
        listed.append((row[at].strip(), row[label_at].strip(), split))
    classes = _classes([label for _, label, _ in listed])
    numbers = {name: number for number, name in enumerate(classes)}
    items = [_item(root, number, row, numbers) for number, row in enumerate(listed, 2)]
    if not items or not classes:
        raise TesseraError(f"{path.name} has no labelled images")
    return Source(
        name=path.resolve().parent.name,
        task="classification",
        classes=classes,
        items=items,
        load=partial(load, root),
        files=partial(_files, root, path),
        folder=None if Path(source).is_file() else Path(source),
        shared_files=(path,),
    )


def _item(root: Path, number: int, row: tuple[str, str, str], numbers: Mapping[str, int]) -> Item:
    name, label, word = row
    split: Split | None = split_of(word)
    problem = find_problem(root, name)
    if not label:
        problem = ("missing label", f"row {number} ({name!r}) has no label")
    elif word and not split:
        problem = ("unknown split", f"row {number} ({name!r}) has the split {word!r}")
    key = make_key(os.path.splitext(name)[0].encode("utf-8", "surrogatepass"))
    return Item(key, name, numbers.get(label), split, number, problem)


def _files(root: Path, table: Path, item: Item) -> tuple[Path, ...]:
    return (root / item.origin, table)


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() in (".csv", ".tsv") else []
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.suffix.lower() in (".csv", ".tsv") and p.is_file())


def _table(source: str) -> Path:
    tables = _tables(Path(source))
    fitting = [path for path in tables if _fits(path)] or tables
    if len(fitting) != 1:
        raise TesseraError(
            f"{source} has {len(fitting) or 'no'} tables of images", hint="give the file itself"
        )
    return fitting[0]


def _fits(path: Path) -> bool:
    """Whether the header has usual names for paths and labels, and the first path is an image."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).rpartition(b"\n")[0]
    try:
        rows = read_csv(head, path.name, _delimiter(path, {}))
        header = next(rows, [])
        at, label_at, _ = _columns(header, {}, path.name)
        first = next((row for row in rows if len(row) == len(header)), None)
    except TesseraError:
        return False
    return first is not None and at != label_at and is_image(first[at].strip())


def _delimiter(path: Path, options: Mapping[str, str]) -> str:
    with path.open("rb") as file:
        first = file.readline(_HEAD_BYTES).decode("latin-1")
    # The first of equals: a header with one column has no separator.
    usual = max(",;\t", key=first.count)
    given = options.get("delimiter", usual)
    given = {"tab": "\t", "\\t": "\t"}.get(given, given)
    if len(given) != 1 or given in '\r\n"':
        raise UsageError(f"the option delimiter can't be {given!r}", hint="give one character")
    return given


def _columns(
    header: Sequence[str], options: Mapping[str, str], where: str
) -> tuple[int, int, int | None]:
    """Positions of path, label and split in a row."""
    names = [name.strip().lower() for name in header]
    positions: dict[str, int | None] = {}
    for option, usual in _COLUMNS.items():
        wanted = [options[option].strip().lower()] if option in options else list(usual)
        found = [names.index(name) for name in wanted if name in names]
        if not found and (option in options or option != "split_column"):
            raise UsageError(
                f"{where} has no column {' or '.join(wanted)}",
                hint=f"its first row has {', '.join(header)[:200] or 'nothing'}: if that is the "
                f"header, give --option {option}=NAME; otherwise add a header",
            )
        positions[option] = found[0] if found else None
    path, label = positions["path_column"], positions["label_column"]
    assert path is not None
    assert label is not None
    return path, label, positions["split_column"]


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    found = {label for label in labels if label}
    if unprintable := next((label for label in found if not label.isprintable()), None):
        raise TesseraError(f"the label {unprintable[:100]!r} can't be printed")
    if all(label.isascii() and label.isdigit() and len(label) < 10 for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found))
