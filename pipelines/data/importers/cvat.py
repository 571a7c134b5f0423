"""CVAT for images 1.1: one XML file with the boxes, polygons and masks of all images.

In: annotations.xml (of any name) beside the images or above a folder of them; `subset` assigns
images to splits. Out: a `Source` for instance segmentation if a shape is a polygon, an ellipse or a
mask, else for detection. Classes are the labels in the file's list, in its order.

Points, lines and skeletons have no area, and rotated boxes aren't read: they are damaged objects.
CVAT for video, whose shapes are tracks, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.importers.support.image_names import ImageNames
from pipelines.data.importers.support.pairs import split_in_folders
from pipelines.data.importers.support.reading import need_folder, split_of
from pipelines.data.importers.support.shapes import SHAPE_OPTIONS, Shape, ShapedImage, make_source
from pipelines.data.safe_parsers import read_xml
from pipelines.data.sources import Source, find_files, find_images, read_file

NAME = "cvat"
OPTIONS: Mapping[str, str] = SHAPE_OPTIONS
MAX_XML_BYTES = 256 << 20
_HEAD_BYTES = 64 << 10
_ROOT = re.compile(rb"<annotations[\s>]")
_OF_CVAT = re.compile(rb"<(image|track|meta|version)[\s>]")
_SHAPES = ("box", "polygon", "ellipse", "mask", "polyline", "points", "cuboid", "skeleton")
_ELLIPSE_CORNERS = 72


def recognises(source: str) -> str:
    folder = Path(source)
    files = _find(folder) if folder.is_dir() else []
    return f"CVAT annotations in {', '.join(files[:3])}" if files else ""


def _find(folder: Path) -> list[str]:
    xmls = [path for path in find_files(folder) if path.lower().endswith(".xml")]
    return [path for path in xmls[:64] if _is_cvat(folder / path)]


def _is_cvat(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return bool(_ROOT.search(head) and _OF_CVAT.search(head))


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the XML files, of up to 256 MiB each."""
    folder = need_folder(source)
    files = _find(folder)
    if not files:
        raise TesseraError(
            f"{source} has no file in the format CVAT for images",
            hint="it is an XML file: <annotations> with an <image> for each image",
        )
    names = ImageNames(folder, find_images(folder))
    images: list[ShapedImage] = []
    classes: dict[str, None] = {}
    notes: list[str] = []
    for path in files:
        root = read_xml(read_file(folder / path, path, MAX_XML_BYTES), path, MAX_XML_BYTES)
        if root.find("track") is not None:
            raise TesseraError(
                f"{path} is in the format CVAT for video: its objects are tracks",
                hint="export the task as CVAT for images, or as COCO",
            )
        labels = [(label.text or "").strip() for label in root.findall(".//meta//label/name")]
        classes.update(dict.fromkeys(name for name in labels if name))
        given = root.findall("image")
        place = path.rpartition("/")[0]
        base = f"{place}/" if place else ""
        located = names.locate(
            [image.get("name") or "" for image in given], [base, f"{base}images/", "", "images/"]
        )
        tags = sum(image.find("tag") is not None for image in given)
        if tags:
            notes.append(f"{path}: {tags} images have tags, which are not read")
        for image, (origin, problem) in zip(given, located, strict=True):
            size = (_side(image.get("height")), _side(image.get("width")))
            shapes = [s for s in image if s.tag in _SHAPES]
            where = f"{path}: image {(image.get('name') or '')[:100]!r}"
            listed = tuple(_shape(s, f"{where}, shape {n}") for n, s in enumerate(shapes))
            split = _split(image.get("subset"), origin)
            images.append(ShapedImage(origin, listed, split, size, problem=problem))
    shared = [folder / path for path in files]
    if notes and not any(image.shapes for image in images):
        raise TesseraError(
            f"{', '.join(files)[:200]}: the images have tags and no shapes, and tags are not read",
            hint="export the task from CVAT as ImageNet: a folder for each class",
        )
    return make_source(
        folder, images, options, classes=list(classes), shared_files=shared, notes=notes
    )


def _split(subset: str | None, origin: str) -> Split | None:
    return (split_of(subset) if subset else None) or split_in_folders(origin)


def _side(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 8 else 0


def _shape(given: Element, where: str) -> Shape:
    name = (given.get("label") or "").strip()
    where = f"{where} ({given.tag}, {name[:50]})"
    if not name:
        return Shape("", where, problem=("unknown class", f"{where} has no label"))
    try:
        return _read_shape(given, name, where)
    except (TypeError, ValueError):
        problem = ("unreadable annotation", f"{where} has a coordinate that is not a number")
        return Shape(name, where, problem=problem)


def _read_shape(given: Element, name: str, where: str) -> Shape:
    if float(given.get("rotation") or 0) % 360:
        problem = ("unsupported shape", f"{where} is rotated, which no task reads")
        return Shape(name, where, problem=problem)
    if given.tag == "box":
        left, top, right, bottom = _numbers(given, "xtl", "ytl", "xbr", "ybr")
        return Shape(name, where, (left, top, right, bottom))
    if given.tag == "polygon":
        points = (given.get("points") or "").replace(",", ";").split(";")
        return Shape(name, where, rings=(tuple(_finite(value) for value in points),))
    if given.tag == "ellipse":
        x, y, rx, ry = _numbers(given, "cx", "cy", "rx", "ry")
        angles = [2 * math.pi * n / _ELLIPSE_CORNERS for n in range(_ELLIPSE_CORNERS)]
        ring = tuple(v for a in angles for v in (x + rx * math.cos(a), y + ry * math.sin(a)))
        return Shape(name, where, (x - rx, y - ry, x + rx, y + ry), (ring,))
    if given.tag == "mask":
        left, top, width, height = _numbers(given, "left", "top", "width", "height")
        counts = tuple(int(count) for count in (given.get("rle") or "").split(","))
        return Shape(name, where, (left, top, left + width, top + height), counts=counts)
    return Shape(name, where, problem=("unsupported shape", f"{where} has no area"))


def _numbers(given: Element, *names: str) -> list[float]:
    return [_finite(given.get(name) or "") for name in names]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
