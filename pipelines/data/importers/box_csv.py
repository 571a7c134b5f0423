"""Tables of boxes: a row for each object, with the image, the class and the box.

In: CSV or TSV files with any of the usual columns, for all images or for each split: Roboflow's and
TensorFlow's filename,width,height,class,xmin,ymin,xmax,ymax; RetinaNet's path,x1,y1,x2,y2,class
without a header; Open Images' ImageID,LabelName,XMin,XMax,YMin,YMax with class-descriptions; a
column bbox with [left, top, width, height]. Out: a `Source` for detection. Classes are the names in
alphabetical order.

Boxes are in pixels from 0 as they are written. If no coordinate of a table exceeds 1 they are
divided by the image's size, as in Open Images. A row with an image and no box says that the image
has no objects.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from models.core.errors import TesseraError, UsageError
from pipelines.data.card import Split
from pipelines.data.importers.support import tables
from pipelines.data.importers.support.coco_files import split_in_file_name
from pipelines.data.importers.support.image_names import ImageNames
from pipelines.data.importers.support.pairs import split_in_folders
from pipelines.data.importers.support.reading import choose, need_folder, split_of
from pipelines.data.importers.support.shapes import SHAPE_OPTIONS, Shape, ShapedImage, make_source
from pipelines.data.importers.support.tables import (
    Table,
    parse_rows,
    read_table,
    usual_delimiter,
)
from pipelines.data.safe_parsers import read_csv
from pipelines.data.sources import Source, find_files, find_images, is_image, read_file

NAME = "box_csv"
OPTIONS: Mapping[str, str] = {
    **{name: text for name, text in SHAPE_OPTIONS.items() if name != "task"},
    "missing": "rows of images that aren't here: reject (default), or skip, for a part of a set",
}
_CLASSES = ("class", "label", "labelname", "label_name", "class_name", "classname", "category")
_CLASSES_LATE = ("name", "object", "target", "class_id", "category_id", "type")
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax"),
    ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"),
)
_SIZES = (
    ("x", "y", "w", "h"),
    ("x", "y", "width", "height"),
    ("xmin", "ymin", "w", "h"),
    ("left", "top", "w", "h"),
    ("bbox_x", "bbox_y", "bbox_w", "bbox_h"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
)
_ONE = ("bbox", "box")
_HEAD_BYTES = 64 << 10
_NUMBER = re.compile(r"[-+]?[0-9]{1,12}([.,][0-9]{0,40})?([eE][-+]?[0-9]{1,3})?", re.ASCII)
_CODE = re.compile(r"/[a-z]/\w+", re.ASCII)
"""A class of Open Images: /m/01g317."""


class _Columns(NamedTuple):
    """Positions in a row. `box` are those of left, top and right, bottom, or of width, height if
    `sized`, or one that has all four numbers."""

    image: int
    label: int | None
    box: tuple[int, ...]
    sized: bool
    split: int | None
    size: tuple[int, int] | None
    crowd: int | None


def recognises(source: str) -> str:
    folder = Path(source)
    found = _find(folder) if folder.is_dir() else []
    return f"boxes in {', '.join(found[:3])}" if found else ""


def _find(folder: Path) -> list[str]:
    """The tables of boxes of a source."""
    paths = [p for p in find_files(folder) if p.lower().endswith((".csv", ".tsv"))]
    return [path for path in paths[:64] if _has_boxes(folder / path)]


def _has_boxes(path: Path) -> bool:
    """Whether the first rows of a table are boxes."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEAD_BYTES)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            data = data.decode("utf-16", "ignore").encode()
        lines = data.splitlines(keepends=True)
        head = b"".join(lines[:20] if len(lines) > 20 or len(data) < _HEAD_BYTES else lines[:-1])
        rows = parse_rows(head, path.name)
        header = tuple(cell.strip() for cell in next(rows, []))
        return _find_columns(header) is not None
    except (OSError, TesseraError):
        return False


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the tables, of up to 256 MiB each.

    Raises TesseraError for a damaged table, and UsageError for one without a column of classes,
    unless the option classes has one name.
    """
    folder = need_folder(source)
    files = _find(folder)
    if not files:
        raise TesseraError(
            f"{source} has no table of boxes",
            hint="its header has columns such as filename, class, xmin, ymin, xmax, ymax",
        )
    skip = choose(options, "missing", ("reject", "skip"), "reject") == "skip"
    names = ImageNames(folder, find_images(folder))
    named, named_files = _read_class_names(folder, files)
    images: dict[str, ShapedImage] = {}
    tables_of: dict[str, str] = {}
    notes: list[str] = []
    orphans: list[tuple[str, str]] = []
    for path in files:
        table = read_table(folder / path)
        rows = _read_rows(table, path, options, named, orphans)
        normalised = _are_normalised(rows)
        if normalised:
            notes.append(f"{path}: no coordinate exceeds 1: they are shares of the image's size")
        split = split_in_file_name(path)
        listed = list(dict.fromkeys(row.image for row in rows))
        place = path.rpartition("/")[0]
        base = f"{place}/" if place else ""
        located = dict(zip(listed, names.locate(listed, _places(base, split), split)))
        missing = sum(problem is not None for _, problem in located.values())
        if skip and missing:
            notes.append(f"{path}: {missing} images are not here and are left out")
        for row in rows:
            origin, problem = located[row.image]
            if problem and skip:
                continue
            if tables_of.setdefault(origin, path) != path:
                raise TesseraError(
                    f"{origin} is in {tables_of[origin]} and in {path}",
                    hint="an image may only be in one table",
                )
            old = images.get(origin)
            shapes = (*(old.shapes if old else ()), *([row.shape] if row.shape else []))
            before = old.split if old else None
            part = split_of(row.split) or before or split or split_in_folders(origin)
            if not problem:
                problem = old.problem if old else None
            if not problem and row.split and not split_of(row.split):
                problem = ("unknown split", f"{origin} has the split {row.split!r}")
            if not problem and before and before != part:
                problem = ("several splits", f"{origin} is in {before} and in {part}")
            images[origin] = ShapedImage(
                origin, shapes, part, row.size, normalised=normalised, problem=problem
            )
    shared = [folder / path for path in (*files, *named_files)]
    return make_source(
        folder, list(images.values()), options, shared_files=shared, notes=notes, orphans=orphans
    )


def _places(base: str, split: Split | None) -> list[str]:
    words = ["", *([f"{split}/"] if split else [])]
    folders = [f"{start}{name}" for start in (base, "") for name in ("", "images/", "data/")]
    return [f"{folder}{word}" for folder in folders for word in words]


class _Row(NamedTuple):
    """A row: the image as it is written, its object if it has one, and what else it says."""

    image: str
    shape: Shape | None
    split: str
    size: tuple[int, int]


def _find_columns(header: Sequence[str]) -> _Columns | None:
    """The columns of a header, or of a first row without one; None if there are no boxes."""
    if len(header) == 6 and is_image(header[0]):  # RetinaNet's tables have no header
        boxes = header[1:5]
        return _retinanet() if all(_NUMBER.fullmatch(c) for c in boxes) or not any(boxes) else None
    names = [name.lower().strip() for name in header]
    image = next((names.index(name) for name in tables.PATHS if name in names), None)
    for usual, sized in ((_CORNERS, False), (_SIZES, True), (tuple((o,) for o in _ONE), True)):
        for columns in usual:
            if image is None or not set(columns) <= set(names):
                continue
            label = next((names.index(n) for n in (*_CLASSES, *_CLASSES_LATE) if n in names), None)
            split = next((names.index(n) for n in tables.SPLITS if n in names), None)
            used = {names.index(name) for name in columns}
            sides = [names.index(n) for n in ("height", "width") if n in names]
            size = (sides[0], sides[1]) if len(sides) == 2 and not used & set(sides) else None
            crowd = names.index("isgroupof") if "isgroupof" in names else None
            box = tuple(names.index(name) for name in columns)
            return _Columns(image, label, box, sized, split, size, crowd)
    return None


def _retinanet() -> _Columns:
    return _Columns(0, 5, (1, 2, 3, 4), False, None, None, None)


def _read_rows(
    table: Table,
    path: str,
    options: Mapping[str, str],
    named: Mapping[str, str],
    orphans: list[tuple[str, str]],
) -> list[_Row]:
    headerless = table.header[:1] == ("1",) and table.rows
    columns = _find_columns(table.rows[0] if headerless else table.header)
    assert columns is not None
    only = options.get("classes", "").strip()
    if columns.label is None and (not only or "," in only):
        raise UsageError(
            f"{path} has boxes and no column of classes: its columns are "
            f"{', '.join(table.header)[:200]}",
            hint="if all objects are of one class, name it: --option classes=NAME",
        )
    split = columns.split
    if split is None:
        split = tables.find_splits(table, columns.image)
    found = []
    for number, row in enumerate(table.rows, table.first):
        where = f"{path}, row {number}"
        if not row[columns.image]:
            orphans.append(("annotation without image", f"{where} has no image"))
            continue
        label = only if columns.label is None else row[columns.label]
        label = named.get(label, label)
        size = (0, 0)
        if columns.size:
            size = (_side(row[columns.size[0]]), _side(row[columns.size[1]]))
        crowd = columns.crowd is not None and row[columns.crowd] == "1"
        shape = _shape([row[at] for at in columns.box], label, columns.sized, where, crowd)
        found.append(_Row(row[columns.image], shape, row[split] if split is not None else "", size))
    return found


def _side(text: str) -> int:
    value = float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else 0
    return int(value) if value > 0 and value == int(value) else 0


def _shape(cells: Sequence[str], label: str, sized: bool, where: str, crowd: bool) -> Shape | None:
    if len(cells) == 1:
        cells = [cell for cell in re.split(r"[\s,;\[\]()]+", cells[0]) if cell]
    if not any(cells):
        return None
    where = f"{where} ({label[:50]})"
    if not label or not label.isprintable():
        return Shape("", where, problem=("unknown class", f"{where} has no class"))
    if len(cells) != 4 or not all(map(_NUMBER.fullmatch, cells)):
        shown = ", ".join(cells)[:100]
        problem = ("unreadable annotation", f"{where}: ({shown}) is not a box of four numbers")
        return Shape(label, where, problem=problem)
    one, two, three, four = (float(cell.replace(",", ".")) for cell in cells)
    box = (one, two, one + three, two + four) if sized else (one, two, three, four)
    return Shape(label, where, box, crowd=crowd)


def _are_normalised(rows: Iterable[_Row]) -> bool:
    values = [v for row in rows if row.shape and row.shape.box for v in row.shape.box]
    return bool(values) and max(values) <= 1 and any(value % 1 for value in values)


def _read_class_names(folder: Path, files: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Code -> name from Open Images' tables of classes, and the tables of classes."""
    names: dict[str, str] = {}
    used = []
    for path in find_files(folder):
        name = path.rpartition("/")[2].lower()
        if path in files or not name.endswith(".csv") or "class" not in name:
            continue
        data = read_file(folder / path, path)
        rows = [row for row in read_csv(data, path, usual_delimiter(data)) if row]
        if not all(len(row) == 2 for row in rows):
            continue
        used.append(path)
        names.update((code.strip(), text.strip()) for code, text in rows if _CODE.fullmatch(code))
    return names, tuple(used)
