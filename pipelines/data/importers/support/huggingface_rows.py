"""Rows of Hugging Face data sets: what they say of an image, as classes or as objects.

In: rows as dictionaries of plain values, and names of classes if the data set has them. Out: the
parts of a `Source`: task, classes, a label or the objects of each row. Must not know files.

Hugging Face writes a class as a number or as text, in a column `label`, and objects as
`{"bbox": [[left, top, width, height], …], "categories": […]}`, in a column `objects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.annotations import Objects
from pipelines.data.card import Split
from pipelines.data.importers.support import tables
from pipelines.data.importers.support.object_lists import ObjectList, open_canvas
from pipelines.data.importers.support.reading import split_of
from pipelines.data.importers.support.tables import Table
from pipelines.data.safe_parsers import is_number
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import AmbiguousError, Reading

OPTIONS: Mapping[str, str] = {"label_column": "column with the labels, or with the objects"}
_BOXES = ("bbox", "boxes", "bboxes")
_CATEGORIES = ("categories", "category", "labels", "label", "class", "class_name", "category_id")
_SHAPES = frozenset(
    {"segmentation", "segmentations", "mask", "masks", "polygon", "polygons", "keypoints"}
)
"""What objects may have beside their boxes, and no task reads from rows."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowLabels:
    """What all rows say. `labels` has the class index of each row, None for other tasks or a
    missing label; `objects` the boxes and class indices of each row, for detection; `splits` the
    words for the split of each row, if a column has them."""

    task: str
    classes: tuple[str, ...]
    labels: tuple[int | None, ...]
    objects: tuple[tuple[Any, tuple[int, ...]], ...] = ()
    column: str = ""
    splits: tuple[str, ...] = ()

    def split(self, at: int, other: Split | None) -> tuple[Split | None, tuple[str, str] | None]:
        """The split of a row, `other` if it names none; and a problem if it is unknown."""
        word = self.splits[at] if self.splits else ""
        if word and not split_of(word):
            return other, ("unknown split", f"row {at + 1} has the split {word!r}")
        return split_of(word) or other, None


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
    text = tuple(tuple(_text(row.get(name)) for name in (image, *columns)) for row in rows)
    table = Table(path, (image, *columns), text, 1)
    split_at = tables.find_splits(table, 0)
    splits = () if split_at is None else tuple(table.column(split_at))
    if not any(map(split_of, set(splits))):  # numbers of folds, for example
        splits = ()
    if objects := _choose_objects(rows, table, options, format):
        found = _read_objects(path, rows, objects, names.get(objects, ()))
        return replace(found, splits=splits)
    if "label_column" in options:
        at: int | None = tables.find_column(table, options["label_column"], "label_column")
    else:
        at = tables.find_labels(table, 0, split_at, format)
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
    return RowLabels("classification", classes, tuple(map(numbers.get, labels)), (), column, splits)


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


def _choose_objects(
    rows: Sequence[Row], table: Table, options: Mapping[str, str], format: str
) -> str:
    """The column of the objects, if there is one and no other is asked for. Raises AmbiguousError
    where the rows also say what a set of boxes has no place for."""
    found = next((name for name in table.header[1:] if _is_objects(rows, name)), "")
    if not found or "label_column" in options:
        return found if options.get("label_column", found) == found else ""
    readings = [Reading(format, {**options, "label_column": found}, "the boxes alone")]
    also = []
    at = tables.usual_column(table, tables.LABELS)
    if at is not None and any(table.column(at)):
        name = table.header[at]
        also.append(f"classes of the images in {name}")
        readings.append(Reading(format, {**options, "label_column": name}, "the classes alone"))
    objects = [_columns(row[found]) for row in rows if row.get(found)]
    drawn = {key for one in objects for key in one if key.lower() in _SHAPES and _has_any(one[key])}
    also += [f"{key} in {found}" for key in sorted(drawn)]
    if also:
        raise AmbiguousError(
            f"{table.path.name} has boxes in the column {found}, and also {', '.join(also)}",
            hint="choose what to take: --option label_column=NAME",
            readings=readings,
        )
    return found


def _has_any(value: object) -> bool:
    return any(value) if isinstance(value, list) else value is not None


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
