"""COCO's JSON files: which ones a source has, their split, and their contents.

In: a folder. Out: images with their annotations and categories, checked as far as the JSON goes.
Must not know images, nor what becomes of the annotations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.importers.support.json_peek import peek
from pipelines.data.importers.support.reading import SPLIT_ORDER, split_of
from pipelines.data.safe_parsers import read_json
from pipelines.data.sources import find_files, is_image, read_file

MAX_JSON_BYTES = 1 << 30
_PEEKED = 256
"""JSON files that are looked at, other than those beside an image of their name."""
_DEEPEST = 5
_LISTS = ("images", "annotations", "categories")
_OBJECT_KEYS = frozenset({"category_id", "bbox", "segmentation"})
_WORDS = frozenset(
    {
        *("instances", "instance", "annotations", "annotation", "labels", "label", "coco", "gt"),
        *("bbox", "boxes", "detection", "detections", "objects", "segmentation", "json", "all"),
        *("person", "keypoints", "result", "results", "default", "oidv6", "oidv7", "classes"),
    }
)
"""Words in the names of annotation files that say nothing about the split."""
_USUAL = re.compile(r"(^|/)(instances_\w+|_annotations\.coco)\.json$")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})", re.ASCII)

Id = int | str


class CocoFile(NamedTuple):
    """A JSON file: the split in its name or its folder's, and its path in the source."""

    split: Split | None
    path: str


class Row(NamedTuple):
    """An image: its `file_name`, its size (0 if the JSON has none), and its annotations."""

    name: str
    height: int
    width: int
    objects: list[dict[str, Any]]


class Content(NamedTuple):
    """A COCO file. `categories` are ids -> names; `orphans` are annotations of no listed image;
    `annotated` is False for a list of images alone."""

    categories: dict[Id, str]
    rows: list[Row]
    orphans: list[tuple[str, str]]
    annotated: bool


def find_coco_files(folder: Path) -> list[CocoFile]:
    """The COCO files of a source by their content, train first.

    Of two files of a split, one with keypoints and one without, the one without is taken.
    """
    if not folder.is_dir():
        return []
    files = list(find_files(folder))
    stems = {path.rpartition(".")[0] for path in files if is_image(path)}
    jsons = [path for path in files if path.lower().endswith(".json")]
    jsons = [p for p in jsons if p.rpartition(".")[0] not in stems and p.count("/") < _DEEPEST]
    found: list[CocoFile] = []
    keypoints: set[CocoFile] = set()
    for path in jsons[:_PEEKED]:
        keys, words = peek(folder / path)
        # A damaged file of a usual name is refused when it is read.
        if not _USUAL.search(path) and not _is_coco(keys, words):
            continue
        file = CocoFile(split_in_file_name(path), path)
        found.append(file)
        if "num_keypoints" in words:
            keypoints.add(file)
    plain = {file.split for file in found if file not in keypoints}
    kept = [file for file in found if file not in keypoints or file.split not in plain]
    order = {split: at for at, split in enumerate(SPLIT_ORDER)}
    return sorted(kept, key=lambda file: order[file.split] if file.split else len(order))


def _is_coco(keys: frozenset[tuple[str, ...]], words: frozenset[str]) -> bool:
    top = {path[0] for path in keys}
    inner = {path[1] for path in keys if len(path) > 1 and path[0] == "annotations"}
    if words & {"segments_info", "caption"} or "shapes" in top:  # panoptic, captions, labelme
        return False
    if "image_id" in inner and inner & _OBJECT_KEYS:
        return True
    if top.issuperset(_LISTS):
        return True
    # A long list of images hides the rest; its end has the other lists.
    return ("images", "file_name") in keys and bool(words & {*_OBJECT_KEYS, "supercategory"})


def split_in_file_name(path: str) -> Split | None:
    """Of annotations/instances_val2017.json, train/_annotations.coco.json, labels/test.json."""
    pure = PurePosixPath(path)
    for text in (pure.stem, *reversed(pure.parent.parts)):
        words = [w for w in re.split(r"[\W_]+", text) if w and w.lower() not in _WORDS]
        if words and (split := split_of("_".join(words))):
            return split
    return None


def read_coco_file(folder: Path, path: str) -> Content:
    """Raises TesseraError for JSON that isn't COCO, and for two images or categories of one id."""
    where = path
    data = read_file(folder / path, where, MAX_JSON_BYTES)
    content = read_json(data, where, MAX_JSON_BYTES)
    if isinstance(content, dict) and "annotations" not in content and "images" in content:
        content = {**content, "annotations": []}  # COCO's image_info_test2017.json
    for name in _LISTS:
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TesseraError(
                f"{where} is not a COCO file: it has no list of {name}",
                hint="it is an object with the lists images, annotations and categories",
            )
    rows_by_id = _read_images(content["images"], where)
    used, orphans = set(), []
    for row in content["annotations"]:
        number = to_id(row.get("image_id"))
        used.add(to_id(row.get("category_id")))
        if number is not None and number in rows_by_id:
            rows_by_id[number].objects.append(row)
        else:
            orphans.append(
                (
                    "annotation without image",
                    f"{where}: annotation {str(row.get('id'))[:50]} belongs to the image "
                    f"{str(row.get('image_id'))[:50]!r}, which is not listed",
                )
            )
    categories = _read_categories(content["categories"], used, where)
    return Content(categories, list(rows_by_id.values()), orphans, bool(content["annotations"]))


def to_id(value: object) -> Id | None:
    """An id as tools write it: 7, 7.0 and "7" are the same. None if it isn't one."""
    if type(value) is float and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if isinstance(value, str):
        text = value.removesuffix(".0")
        return int(text) if _INTEGER.fullmatch(text) else value
    return value if type(value) is int else None


def _read_images(images: Sequence[Mapping[str, Any]], where: str) -> dict[Id, Row]:
    found: dict[Id, Row] = {}
    for image in images:
        number = to_id(image.get("id"))
        name = image.get("file_name") or image.get("coco_url")  # of LVIS
        if number is None or not isinstance(name, str):
            raise TesseraError(f"{where}: the image {str(image)[:100]} has no id or no file_name")
        if number in found:
            raise TesseraError(f"{where}: two images have the id {number!r}")
        sides = (image.get("height"), image.get("width"))
        height, width = (to_id(side) for side in sides)
        found[number] = Row(name, _positive(height), _positive(width), [])
    return found


def _positive(side: Id | None) -> int:
    return side if isinstance(side, int) and side > 0 else 0


def _read_categories(
    rows: Iterable[Mapping[str, Any]], used: set[Id | None], where: str
) -> dict[Id, str]:
    """Of two categories with one name, as Roboflow writes for the whole set, the one without
    objects is left out."""
    names: dict[Id, str] = {}
    for row in rows:
        number, name = to_id(row.get("id")), row.get("name")
        if number is None or not isinstance(name, str) or not name.isprintable():
            raise TesseraError(f"{where}: the category {str(row)[:100]} has no id or no name")
        if names.setdefault(number, name) != name:
            raise TesseraError(f"{where}: two categories have the id {number}")
    listed = list(names.values())
    names = {n: name for n, name in names.items() if n in used or listed.count(name) == 1}
    if not names or len(set(names.values())) != len(names):
        raise TesseraError(
            f"{where}: it has no categories, or two with the same name",
            hint="give each category a name of its own",
        )
    return names
