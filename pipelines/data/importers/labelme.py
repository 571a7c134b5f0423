"""labelme and X-AnyLabeling: a JSON file with polygons and rectangles for each image.

In: JSON files with `shapes` and `imagePath`, beside their images or in a folder of their own. Out:
a `Source` for instance segmentation if a shape is a polygon or a circle, else for detection.
Polygons with the same label and group_id are one object, as in labelme's own converters.

The image is the one at `imagePath`, seen from the JSON file, or else the one with the JSON's name;
`imageData` is not used. Points and lines have no area: they are damaged objects.
"""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.core.errors import TesseraError
from pipelines.data.importers.support.image_names import split_name
from pipelines.data.importers.support.json_peek import peek
from pipelines.data.importers.support.pairs import pair, split_in_folders
from pipelines.data.importers.support.reading import need_folder, read_inside
from pipelines.data.importers.support.shapes import SHAPE_OPTIONS, Shape, ShapedImage, make_source
from pipelines.data.importers.support.unlabelled import UNLABELLED_OPTION, take_unlabelled
from pipelines.data.safe_parsers import is_number, read_json
from pipelines.data.sources import (
    AmbiguousError,
    Reading,
    Source,
    find_files,
    is_image,
    read_file,
)

NAME = "labelme"
OPTIONS: Mapping[str, str] = {**SHAPE_OPTIONS, **UNLABELLED_OPTION}
MAX_JSON_BYTES = 256 << 20
_PEEKED = 32
_CIRCLE_CORNERS = 72
_NO_AREA = frozenset({"point", "points", "line", "linestrip", "cuboid", "quadrilateral"})


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    jsons = [path for path in find_files(folder) if path.lower().endswith(".json")]
    step = max(len(jsons) // _PEEKED, 1)
    found = next((path for path in jsons[::step] if _is_labelme(folder / path)), None)
    return f"shapes in {found}" if found else ""


def _is_labelme(path: Path) -> bool:
    keys, words = peek(path)
    return ("shapes",) in keys and ("imagePath" in words or "imageHeight" in words)


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads all JSON files. Raises TesseraError if none has shapes; AmbiguousError for rotated
    boxes, which no task reads, unless the option task is given."""
    folder = need_folder(source)
    files = list(find_files(folder))
    jsons = [path for path in files if path.lower().endswith(".json")]
    pictures = [path for path in files if is_image(path)]
    pairs = pair(jsons, pictures)
    known, found = frozenset(files), []
    flags: set[str] = set()
    for path in jsons:
        image = _read_image(folder, path, pairs.get(path, ""), known, flags)
        if image is not None:
            found.append(image)
    if not found:
        raise TesseraError(
            f"{source} has no labelme files", hint="they are JSON objects with shapes and imagePath"
        )
    rotated = next((s for i in found for s in i.shapes if s.where.endswith("rotation)")), None)
    if rotated and "task" not in options:
        raise AmbiguousError(
            f"{rotated.where} is a rotated box, which no task reads",
            hint="--option task=detection takes the upright boxes around them",
            readings=[
                Reading(NAME, {**options, "task": "detection"}, "the upright boxes around them"),
                Reading(NAME, {**options, "task": "instance_segmentation"}, "as polygons"),
            ],
        )
    labelled = {image.origin for image in found}
    places = {os.path.dirname(origin) for origin in labelled}
    without = [p for p in pictures if os.path.dirname(p) in places and p not in labelled]
    notes = _report_flags(found, flags)
    taken = take_unlabelled(without, options, notes, "JSON file")
    found += [ShapedImage(path, split=split_in_folders(path)) for path in taken]
    listed = _find_names(folder, {shape.name for image in found for shape in image.shapes})
    return make_source(folder, found, options, notes=notes, shared_files=listed)


def _report_flags(found: Sequence[ShapedImage], flags: set[str]) -> list[str]:
    """A note on the flags of images, which labelme has for classes. Raises TesseraError where they
    are all that the files have."""
    if not flags:
        return []
    shown = ", ".join(sorted(flags)[:5]) + (", …" if len(flags) > 5 else "")
    if not any(image.shapes for image in found):
        raise TesseraError(
            f"the labelme files have flags ({shown}) and no shapes, and flags are not read",
            hint="for classes, move the images to a folder for each class, or list them in a table "
            "with the columns path and label",
        )
    return [f"images have flags ({shown}), which are not read"]


def _find_names(folder: Path, used: set[str]) -> list[Path]:
    """labels.txt, the list of names that labelme is started with, if it has all that are used."""
    path = folder / "labels.txt"
    if not path.is_file():
        return []
    lines = read_file(path, path.name).decode("utf-8-sig", "replace").splitlines()
    return [path] if used - {""} <= {line.strip() for line in lines} else []


def _read_image(
    folder: Path, path: str, named: str, known: frozenset[str], flags: set[str]
) -> ShapedImage | None:
    """The image of a JSON file; None for a file of another kind. Adds its flags to `flags`."""
    try:
        content = read_json(read_inside(folder, path), path, MAX_JSON_BYTES)
    except TesseraError as error:
        if not named:
            return None
        unread = ("unreadable annotation", f"{error.message} {error.hint}".strip())
        return ShapedImage(named, split=split_in_folders(named), files=(path,), problem=unread)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        return None
    marks = content.get("flags")
    if isinstance(marks, dict):
        flags.update(name[:50] for name, value in marks.items() if value and name.isprintable())
    given = content.get("imagePath")
    parts = given.replace("\\", "/") if isinstance(given, str) else ""
    origin = posixpath.normpath(posixpath.join(os.path.dirname(path), parts)) if parts else ""
    origin = origin if origin in known and is_image(origin) else named
    problem: tuple[str, str] | None = None
    if not origin:
        origin = path
        last = (split_name(parts) or ("",))[-1][:100]
        inside = "; the one inside, imageData, is not read" if content.get("imageData") else ""
        reason = f"{path}: there is no image {last!r}, nor one of its own name{inside}"
        problem = ("missing image", reason)
    size = tuple(_side(content.get(side)) for side in ("imageHeight", "imageWidth"))
    listed = [_shape(shape, f"{path}: shape {n}") for n, shape in enumerate(shapes)]
    return ShapedImage(
        origin,
        tuple(_join_groups(listed, shapes)),
        split_in_folders(origin),
        (size[0], size[1]),
        (path,),
        problem=problem,
    )


def _side(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def _shape(given: Any, where: str) -> Shape:
    kind = given.get("shape_type") or "polygon" if isinstance(given, dict) else ""
    name = given.get("label") if isinstance(given, dict) else None
    where = f"{where} ({str(name)[:50]}, {str(kind)[:20]})"
    if not isinstance(name, str) or not name.strip().isprintable() or not name.strip():
        return Shape("", where, problem=("unknown class", f"{where} has no label"))
    name = name.strip()
    points = given.get("points")
    if (
        not isinstance(points, list)
        or not all(isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points)
        or not all(math.isfinite(value) for point in points for value in point)
    ):
        return Shape(name, where, problem=("unreadable annotation", f"{where} has no points"))
    flat = tuple(float(value) for point in points for value in point)
    columns, rows = flat[::2], flat[1::2]
    if kind == "rectangle" and len(points) in (2, 4):
        return Shape(name, where, (min(columns), min(rows), max(columns), max(rows)))
    if kind == "circle" and len(points) == 2:
        return _circle(name, where, flat)
    if kind in ("polygon", "rotation") and len(points) >= 3:
        return Shape(name, where, rings=(flat,))
    why = "has no area" if kind in _NO_AREA else "is not a shape that is read"
    return Shape(name, where, problem=("unsupported shape", f"{where} {why}"))


def _circle(name: str, where: str, flat: Sequence[float]) -> Shape:
    x, y, radius = flat[0], flat[1], math.dist(flat[:2], flat[2:])
    angles = [2 * math.pi * n / _CIRCLE_CORNERS for n in range(_CIRCLE_CORNERS)]
    ring = [v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]
    return Shape(name, where, (x - radius, y - radius, x + radius, y + radius), (tuple(ring),))


def _join_groups(shapes: Sequence[Shape], given: Sequence[Any]) -> list[Shape]:
    """Shapes, with the polygons of one label and group_id as one."""
    joined: dict[object, Shape] = {}
    for number, (shape, row) in enumerate(zip(shapes, given, strict=True)):
        group = row.get("group_id") if isinstance(row, dict) else None
        key: object = number
        if shape.rings and not shape.box and type(group) is int:
            key = (shape.name, group)
        other = joined.get(key)
        if other is None:
            joined[key] = shape
        else:
            joined[key] = Shape(shape.name, other.where, rings=(*other.rings, *shape.rings))
    return list(joined.values())
