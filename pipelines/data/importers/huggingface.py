"""Hugging Face's `imagefolder` with metadata: images and a metadata.jsonl that names them.

In: SOURCE/metadata.jsonl, or SOURCE/train/metadata.jsonl, SOURCE/test/metadata.jsonl, with a line
for each image: `{"file_name": "0001.png", "label": "cat"}`, or with `objects`. Out: a `Source` for
classification or detection. Its metadata.csv is read by `csv`, its Parquet files by `parquet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.importers.support import huggingface_rows
from pipelines.data.importers.support.huggingface_rows import RowLabels, read_labels
from pipelines.data.importers.support.image_finder import ImageFinder
from pipelines.data.importers.support.reading import (
    load,
    make_keys,
    need_folder,
    read_inside,
    split_of,
)
from pipelines.data.safe_parsers import read_json
from pipelines.data.sources import Item, Source, find_files, find_images, read_file

NAME = "huggingface"
OPTIONS: Mapping[str, str] = huggingface_rows.OPTIONS
MAX_LINE_BYTES = 16 << 20
_FILE = "metadata.jsonl"
_NAMES = ("file_name", "image_file_name", "image")


def recognises(source: str) -> str:
    folder = Path(source)
    found = _find(folder) if folder.is_dir() else []
    if not found:
        return ""
    with (folder / found[0]).open("rb") as file:
        first = file.readline(MAX_LINE_BYTES)
    try:
        row = read_json(first, found[0], MAX_LINE_BYTES)
    except TesseraError:
        return ""
    named = isinstance(row, dict) and any(name in row for name in _NAMES)
    return f"labels in {', '.join(found[:3])}" if named else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the lines. Raises TesseraError for a line that isn't JSON or names no image."""
    folder = need_folder(source)
    found = _find(folder)
    if not found:
        raise TesseraError(f"{source} has no {_FILE}")
    images = list(find_images(folder))
    rows: list[dict[str, Any]] = []
    items: list[Item] = []
    for path in found:
        new = _read_lines(folder / path)
        near = path.rpartition("/")[0]
        image = _image_column(new, path)
        located = ImageFinder(folder, images, near).find_all([str(row[image]) for row in new])
        splits = [split_of(part) for part in reversed(near.split("/"))]
        split = next((split for split in splits if split), None)
        items += [
            Item("", name, None, split, len(rows) + at, problem)
            for at, (name, problem) in enumerate(located)
        ]
        rows += [{**row, "file_name": row[image]} for row in new]
    if not items:
        raise TesseraError(f"{source} has no lines in {', '.join(found)}")
    labels = read_labels(Path(found[0]), rows, "file_name", options, {}, NAME)
    return Source(
        name=folder.resolve().name,
        task=labels.task,
        classes=labels.classes,
        items=_label_items(items, labels),
        load=partial(load, folder),
        annotate=partial(_annotate, folder, labels) if labels.objects else None,
        files=partial(_files, folder, tuple(found)),
        folder=folder,
        shared_files=tuple(folder / path for path in found),
    )


def _label_items(items: list[Item], labels: RowLabels) -> list[Item]:
    unique = list(dict.fromkeys(item.origin for item in items))
    keys = dict(zip(unique, make_keys(unique)))
    named: dict[str, set[int | None]] = {}
    for item, label in zip(items, labels.labels):
        named.setdefault(item.origin, set()).add(label)
    made = []
    for item, label in zip(items, labels.labels):
        split, unknown = labels.split(item.row, item.split)
        problem = item.problem or unknown
        if problem is None and labels.task == "classification":
            if label is None:
                problem = ("missing label", f"{item.origin} has no {labels.column}")
            elif len(named[item.origin]) > 1:
                problem = ("several labels", f"{item.origin} has another {labels.column} elsewhere")
        made.append(Item(keys[item.origin], item.origin, label, split, item.row, problem))
    return made


def _find(folder: Path) -> list[str]:
    return [path for path in find_files(folder) if path.rpartition("/")[2] == _FILE]


def _image_column(rows: list[dict[str, Any]], where: str) -> str:
    for name in _NAMES:
        if all(isinstance(row.get(name), str) for row in rows):
            return name
    line = next(
        n for n, row in enumerate(rows, 1) if not any(isinstance(row.get(k), str) for k in _NAMES)
    )
    raise TesseraError(f"{where}, line {line} has no file_name", hint="name the image's file in it")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_file(path, path.name).split(b"\n"), 1):
        if not line.strip():
            continue
        row = read_json(line, f"{path.name}, line {number}", MAX_LINE_BYTES)
        if not isinstance(row, dict):
            raise TesseraError(f"{path.name}, line {number} is not a JSON object")
        rows.append(row)
    return rows


def _annotate(folder: Path, labels: RowLabels, item: Item) -> Objects:
    data = read_inside(folder, item.origin)
    return huggingface_rows.read_objects(data, item.origin, *labels.objects[item.row])


def _files(folder: Path, used: tuple[str, ...], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in used))
