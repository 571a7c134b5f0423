"""COCO: images with a JSON file for each split; boxes, polygons, both kinds of run lengths, crowds.

In: SOURCE/annotations/instances_train2017.json or SOURCE/instances_val.json, with images in
SOURCE/train2017, SOURCE/images/…, SOURCE/train or at `file_name`; or Roboflow's
SOURCE/train/_annotations.coco.json. Out: a `Source` for instance segmentation if each object has a
segmentation, else for detection. Classes are the categories in the order of their ids. The name of
the JSON file or of its folder gives the split. T.-Y. Lin et al., "Microsoft COCO: Common Objects in
Context", ECCV 2014.

A box or polygon that exceeds its image by at most half a pixel, as rounded coordinates do, is
clipped; one that exceeds it further is an error. Masks equal those of pycocotools in every pixel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.core.errors import TesseraError, UsageError
from pipelines.data import rle
from pipelines.data.annotations import Objects, clip
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.coco_masks import read_mask
from pipelines.data.importers.support.reading import (
    SPLIT_ORDER,
    check_stated_size,
    choose,
    find_problem,
    image_size,
    is_plain,
    load,
    locate,
    need_folder,
    no_images,
    split_of,
)
from pipelines.data.safe_parsers import is_number, read_json
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source, find_folders, read_file

NAME = "coco"
TASKS = ("instance_segmentation", "detection")
OPTIONS: Mapping[str, str] = {
    "task": "detection drops the masks; by default they are kept if every object has one",
    "images": "folder that file_name is relative to",
    "train": "JSON file of the split train",
    "val": "JSON file of the split val",
    "test": "JSON file of the split test",
}
MAX_JSON_BYTES = 1 << 30
_FILE = re.compile(r"instances_(\w+)\.json")
_ROBOFLOW = "_annotations.coco.json"


class _Row(NamedTuple):
    """An image's size in the JSON (0 if it isn't there), and its annotations."""

    height: int
    width: int
    objects: list[dict[str, Any]]


def recognises(source: str) -> str:
    files = _find(Path(source))
    return f"COCO annotations in {', '.join(path.name for _, path in files)}" if files else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads the JSON files, of up to 1 GiB each; annotations are checked later, one by one.

    Raises TesseraError for JSON that isn't COCO, for categories that differ between the files, and
    for annotations of images that aren't listed.
    """
    folder = need_folder(source)
    given: list[tuple[Split | None, Path]] = [
        (split, _given(folder, options[split])) for split in SPLIT_ORDER if split in options
    ]
    files = given or _find(folder)
    if not files:
        raise TesseraError(
            f"{source} has no COCO annotations",
            hint="name them instances_train.json or annotations/instances_val2017.json, or give "
            "the options train, val, test",
        )
    if "images" in options and not (folder / options["images"]).is_dir():
        raise UsageError(f"the option images: there is no folder {folder / options['images']}")
    root = folder / options["images"] if "images" in options else folder
    items: list[Item] = []
    rows: list[_Row] = []
    categories: dict[int, str] = {}
    for split, path in files:
        content = _read(path)
        found = _categories(content, path.name)
        if categories and found != categories:
            raise TesseraError(
                f"{path.name} has other categories than {files[0][1].name}",
                hint="all files of a data set have the same categories with the same ids",
            )
        categories = found
        new = _rows(content, path.name)
        prefix = "" if "images" in options else _prefix(folder, path, [name for name, _ in new])
        for name, row in new:
            items.append(_item(root, prefix + name, split, len(rows)))
            rows.append(row)
    if not items:
        raise no_images(source)
    task = choose(options, "task", TASKS, _task(rows))
    numbers = {number: at for at, number in enumerate(sorted(categories))}
    return Source(
        name=folder.resolve().name,
        task=task,
        classes=tuple(categories[number] for number in numbers),
        items=items,
        load=partial(load, root),
        annotate=partial(_annotate, root, rows, numbers, task == "instance_segmentation"),
        files=partial(_files, root, tuple(path for _, path in files)),
        notes=tuple(
            f"{path.name} has the split {split}" if split else f"{path.name} has no split"
            for split, path in files
        ),
    )


def _given(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint="give the JSON file of that split")
    return path


def _find(folder: Path) -> list[tuple[Split | None, Path]]:
    """(split, file) of the files with a usual name, train first."""
    if not folder.is_dir():
        return []
    inner = find_folders(folder)
    found: list[tuple[Split | None, Path]] = []
    for place in (folder, folder / "annotations"):
        for path in sorted(place.glob("instances_*.json")):
            match = _FILE.fullmatch(path.name)
            if match and path.is_file():
                found.append((split_of(match[1]), path))
    for place in (folder, *inner):
        if (place / _ROBOFLOW).is_file():
            found.append((split_of(place.name), place / _ROBOFLOW))
    return sorted(found, key=lambda pair: SPLIT_ORDER.index(pair[0]) if pair[0] else 3)


def _item(root: Path, origin: str, split: Split | None, row: int) -> Item:
    key = make_key(_utf8(origin.rpartition(".")[0] or origin))
    return Item(key, origin, None, split, row, find_problem(root, origin))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _files(root: Path, jsons: tuple[Path, ...], item: Item) -> tuple[Path, ...]:
    return (root / item.origin, *jsons)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists in a COCO file."""
    data = read_file(path, path.name, MAX_JSON_BYTES)
    content = read_json(data, path.name, MAX_JSON_BYTES)
    for name in ("images", "annotations", "categories"):
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TesseraError(
                f"{path.name} is not a COCO file: it has no list of {name}",
                hint="it is an object with the lists images, annotations and categories",
            )
    return dict(content)


def _categories(content: dict[str, list[dict[str, Any]]], where: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for row in content["categories"]:
        number, name = row.get("id"), row.get("name")
        if type(number) is not int or not isinstance(name, str) or not name.isprintable():
            raise TesseraError(f"{where}: the category {str(row)[:100]} has no id or no name")
        if names.setdefault(number, name) != name:
            raise TesseraError(f"{where}: two categories have the id {number}")
    if not names or len(set(names.values())) != len(names):
        raise TesseraError(f"{where}: it has no categories, or two with the same name")
    return names


def _rows(content: dict[str, list[dict[str, Any]]], where: str) -> list[tuple[str, _Row]]:
    """(file_name, row) of each image, in the order of the file."""
    found: dict[int | str, tuple[str, _Row]] = {}
    for image in content["images"]:
        number, name = image.get("id"), image.get("file_name")
        if not isinstance(number, int | str) or not isinstance(name, str):
            raise TesseraError(f"{where}: the image {str(image)[:100]} has no id or no file_name")
        if number in found:
            raise TesseraError(f"{where}: two images have the id {number!r}")
        size = (image.get("height"), image.get("width"))
        height, width = (side if type(side) is int and side > 0 else 0 for side in size)
        found[number] = (name, _Row(height, width, []))
    for row in content["annotations"]:
        number = row.get("image_id")
        if not isinstance(number, int | str) or number not in found:
            raise TesseraError(
                f"{where}: annotation {str(row.get('id'))[:50]} belongs to the image "
                f"{str(number)[:50]!r}, which is not listed"
            )
        found[number][1].objects.append(row)
    return list(found.values())


def _prefix(folder: Path, path: Path, names: Sequence[str]) -> str:
    """The folder of the first images, relative to the source and with a slash at its end."""
    match = _FILE.fullmatch(path.name)
    words = [match[1]] if match else []
    if match and (split := split_of(match[1])):
        words += [name for name in ("train", "val", "valid", "test") if split_of(name) == split]
    places = ["", *(f"{word}/" for word in words)]
    places += [f"images/{place}" for place in places]
    if path.parent != folder:
        places.append(f"{path.parent.relative_to(folder).as_posix()}/")
    for name in [name for name in names[:20] if is_plain(name)]:
        for place in places:
            if find_problem(folder, place + name) is None:
                return place
    return ""


def _task(rows: Sequence[_Row]) -> str:
    objects = [annotation for row in rows for annotation in row.objects]
    whole = bool(objects) and all(annotation.get("segmentation") for annotation in objects)
    return "instance_segmentation" if whole else "detection"


def _annotate(
    root: Path, rows: Sequence[_Row], numbers: Mapping[int, int], with_masks: bool, item: Item
) -> Objects:
    row = rows[item.row]
    height, width = image_size(read_file(locate(root, item.origin), item.origin), item.origin)
    if row.height and row.width:
        check_stated_size((row.height, row.width), (height, width), item.origin)
    boxes, labels, crowd, masks = [], [], [], []
    for number, annotation in enumerate(row.objects):
        where = f"{item.origin}: object {number} (id {str(annotation.get('id'))[:50]})"
        labels.append(_label(annotation, numbers, where))
        crowd.append(_crowd(annotation, where))
        mask = None
        if with_masks:
            mask = read_mask(annotation.get("segmentation"), height, width, where)
            masks.append(rle.write(mask))
        boxes.append(_box(annotation.get("bbox"), mask, height, where))
    return Objects(
        clip(np.array(boxes, np.float64).reshape(-1, 4), height, width),
        np.array(labels, np.int64),
        np.array(crowd, bool),
        tuple(masks) if with_masks else None,
    )


def _label(annotation: Mapping[str, Any], numbers: Mapping[int, int], where: str) -> int:
    number = annotation.get("category_id")
    if type(number) is not int or number not in numbers:
        raise SampleError("unknown class", f"{where}: there is no category {str(number)[:50]!r}")
    return numbers[number]


def _crowd(annotation: Mapping[str, Any], where: str) -> bool:
    value = annotation.get("iscrowd", 0)
    if value not in (0, 1):
        raise SampleError("unreadable annotation", f"{where}: iscrowd is neither 0 nor 1")
    return bool(value)


def _box(given: Any, mask: rle.Counts | None, height: int, where: str) -> list[float]:
    """Left, top, right, bottom; those of the mask if the file has no box."""
    if given is None and mask is not None and rle.area(mask):
        return [float(value) for value in rle.box(mask, height)]
    if not isinstance(given, list) or len(given) != 4 or not all(map(is_number, given)):
        raise SampleError(
            "unreadable annotation", f"{where}: its bbox is not left, top, width and height"
        )
    left, top, width, height = given
    return [float(left), float(top), float(left + width), float(top + height)]
