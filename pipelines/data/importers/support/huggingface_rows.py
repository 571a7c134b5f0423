"""Rows of Hugging Face data sets: what they say of an image, as classes or as objects.

In: rows as dictionaries of plain values, and names of classes if the data set has them. Out: the
parts of a `Source`: task, classes, a label or the objects of each row. Must not know files.

Hugging Face writes a class as a number or as text, in a column `label`, and objects as
`{"bbox": [[left, top, width, height], …], "categories": […]}`, in a column `objects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.importers.support import tables
from pipelines.data.importers.support.object_lists import ObjectList, open_canvas
from pipelines.data.importers.support.tables import Table
from pipelines.data.safe_parsers import is_number
from pipelines.data.sample_error import SampleError

OPTIONS: Mapping[str, str] = {"label_column": "column with the labels; default label"}
_BOXES = ("bbox", "boxes", "bboxes")
_CATEGORIES = ("categories", "category", "labels", "label", "class", "class_name", "category_id")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowLabels:
    """What all rows say. `labels` has the class index of each row, None for other tasks or a
    missing label; `objects` the boxes and class indices of each row, for detection."""

    task: str
    classes: tuple[str, ...]
    labels: tuple[int | None, ...]
    objects: tuple[tuple[Any, tuple[int, ...]], ...] = ()
    column: str = ""


def read_labels(
    path: Path,
    rows: Sequence[Row],
    image: str,
    options: Mapping[str, str],
    names: Mapping[str, Sequence[str]],
    format: str,
) -> RowLabels:
    """Finds out what the rows say. `names` has the class names of a column, if they are known.

    Raises TesseraError if no column can have labels, AmbiguousError if several can.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row if name != image))
    objects = next((name for name in columns if _is_objects(rows, name)), "")
    if objects and "label_column" not in options:
        return _read_objects(path, rows, objects, names.get(objects, ()))
    text = tuple(tuple(_text(row.get(name)) for name in (image, *columns)) for row in rows)
    table = Table(path, (image, *columns), text, 1)
    if "label_column" in options:
        at: int | None = tables.find_column(table, options["label_column"], "label_column")
    else:
        at = tables.find_labels(table, 0, tables.usual_column(table, tables.SPLITS), format)
    if at is None:
        raise TesseraError(
            f"{path.name} has no labels: its columns are {', '.join(columns)[:200] or 'none'}",
            hint="if one has them: --option label_column=NAME; for images without labels: --format "
            "images",
        )
    labels = table.column(at)
    column = table.header[at]
    known = tuple(names.get(column, ()))
    classes = known or _sorted({label for label in labels if label})
    numbers = {str(n) if known else name: n for n, name in enumerate(classes)}
    return RowLabels("classification", classes, tuple(map(numbers.get, labels)), (), column)


def read_objects(data: bytes, where: str, boxes: Any, labels: Sequence[int]) -> Objects:
    """The objects of an image. Boxes are left, top, width, height in pixels."""
    found = ObjectList(open_canvas(data, where, ""), with_masks=False)
    for number, (box, label) in enumerate(zip(boxes, labels)):
        at = f"{where}: object {number}"
        with found.one(label):
            if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
                raise SampleError(
                    "unreadable annotation", f"{at}: its bbox is not left, top, width and height"
                )
            left, top, width, height = map(float, box)
            found.add(label, [left, top, left + width, top + height], at)
    return found.finish()


def _is_objects(rows: Sequence[Row], name: str) -> bool:
    first = _columns(next((row[name] for row in rows if row.get(name)), None))
    return any(key in first for key in _BOXES)


def _columns(value: object) -> dict[str, Any]:
    """Objects as lists beside each other, which may be a list of objects in the file."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        names = dict.fromkeys(key for one in value for key in one)
        return {name: [one.get(name) for one in value] for name in names}
    return value if isinstance(value, dict) else {}


def _read_objects(path: Path, rows: Sequence[Row], name: str, known: Sequence[str]) -> RowLabels:
    listed: list[tuple[Any, list[str]]] = []
    for number, row in enumerate(rows, 1):
        value = _columns(row.get(name))
        boxes: Any = next((value[key] for key in _BOXES if key in value), [])
        categories: Any = next((value[key] for key in _CATEGORIES if key in value), [])
        lists = isinstance(boxes, list) and isinstance(categories, list)
        if not lists or len(categories) != len(boxes):
            counts = f"{len(boxes)} boxes and {len(categories)} categories" if lists else "no lists"
            raise TesseraError(
                f"{path.name}, row {number}: {name} has {counts}",
                hint=f"it needs one of {', '.join(_CATEGORIES[:3])} for each box",
            )
        listed.append((boxes, [_text(category) for category in categories]))
    classes = tuple(known) or _sorted({text for _, texts in listed for text in texts})
    numbers = {str(n) if known else text: n for n, text in enumerate(classes)}
    objects = tuple(
        (boxes, tuple(numbers.get(text, -1) for text in texts)) for boxes, texts in listed
    )
    return RowLabels("detection", classes, (None,) * len(rows), objects, name)


def _text(value: object) -> str:
    if value is None or isinstance(value, dict | list | bytes):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _sorted(labels: set[str]) -> tuple[str, ...]:
    if all(label.isascii() and label.isdigit() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
