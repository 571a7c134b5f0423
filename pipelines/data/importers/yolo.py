"""YOLO: a text file for each image, with a class and a normalised box or polygon in each line.

In: SOURCE/images/train/x.jpg with SOURCE/labels/train/x.txt, or SOURCE/train/images with
SOURCE/train/labels, or either without splits. Out: a `Source` for instance segmentation if the
first file with objects has polygons, else for detection. Classes are `names` in data.yaml (or in
the only other .yaml), or the lines of classes.txt or obj.names. The yaml's `train`, `val` and
`test` assign folders of the source to splits; paths outside the source are ignored, and folders
that aren't listed are assigned by their names. As in YOLO, an image without a text file has no
objects.

`class cx cy w h` is a box by its centre and size, `class x1 y1 x2 y2 x3 y3 …` a polygon. Polygons
have boxes too, so a file with both is read for detection. Boxes that exceed the image by at most
half a pixel are clipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import rle
from pipelines.data.annotations import Objects, clip
from pipelines.data.card import SPLITS, Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.coco_masks import draw
from pipelines.data.importers.support.reading import (
    choose,
    image_size,
    load,
    nearby,
    need_folder,
    no_images,
    read_inside,
    split_of,
)
from pipelines.data.safe_parsers import read_yaml
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source, find_files, is_image, read_file

NAME = "yolo"
TASKS = ("instance_segmentation", "detection")
OPTIONS: Mapping[str, str] = {
    "task": "detection or instance_segmentation; by default that of the first objects",
    "classes": "names of the classes, with commas, if no file has them",
}
MAX_TEXT_BYTES = 16 << 20
_NUMBER = re.compile(r"[-+]?[0-9]{1,12}(\.[0-9]{0,40})?([eE][-+]?[0-9]{1,3})?", re.ASCII)
_NAME_FILES = ("classes.txt", "obj.names", "classes.names", "labels/classes.txt")


def recognises(source: str) -> str:
    roots = _find(source)
    return f"images and YOLO labels in {roots[0].name}" if len(roots) == 1 else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the images; text files are read when their images are packed."""
    folder = need_folder(source)
    roots = _find(source)
    if len(roots) != 1:
        raise TesseraError(
            f"{source} has {len(roots) or 'no'} data sets in YOLO format",
            hint="it must be SOURCE/images/train/x.jpg with SOURCE/labels/train/x.txt",
        )
    root = roots[0]
    content, where = _read_yaml(root)
    classes = _names(root, options, content, where)
    roles, notes = _roles(root, content, where)
    files = list(find_files(root))
    texts = {path for path in files if path.endswith(".txt")}
    items = []
    for path in files:
        parts = path.split("/")
        if is_image(path) and "images" in parts[:2]:
            split = _role(path, roles) or _split(parts)
            items.append(Item(make_key(os.path.splitext(path)[0]), path, None, split))
    if not items:
        raise no_images(source)
    unlabelled = sum(_text_of(item.origin) not in texts for item in items)
    first = next((item for item in items if _lines(root, texts, item)), None)
    polygons = first is not None and len(_lines(root, texts, first)[0].split()) != 5
    task = choose(options, "task", TASKS, TASKS[not polygons])
    if unlabelled:
        notes.append(f"{unlabelled} images have no text file, so no objects")
    return Source(
        name=folder.resolve().name,
        task=task,
        classes=classes,
        items=items,
        load=partial(load, root),
        annotate=partial(
            _annotate, root, frozenset(texts), len(classes), task == "instance_segmentation"
        ),
        files=partial(_files, root, frozenset(texts)),
        notes=tuple(notes),
    )


def _find(source: str) -> list[Path]:
    """The folders that have `images` and `labels` with a text file, at most one level down."""
    found = []
    for root in nearby(source, 1):
        places = [root, *(place for place in nearby(str(root), 1)[1:] if split_of(place.name))]
        for place in places:
            labels = place / "labels"
            whole = (place / "images").is_dir() and labels.is_dir()
            if whole and any(path.endswith(".txt") for path in find_files(labels)):
                found.append(root)
                break
    # A split is not a data set of its own.
    return [root for root in found if root.parent not in found]


def _split(parts: list[str]) -> Split | None:
    """train/images/x.jpg or images/train/x.jpg."""
    other = parts[0] if parts[1] == "images" else parts[1]
    return split_of(other) if len(parts) > 2 else None


def _text_of(path: str) -> str:
    parts = path.split("/")
    parts[parts.index("images")] = "labels"
    return os.path.splitext("/".join(parts))[0] + ".txt"


def _files(root: Path, texts: frozenset[str], item: Item) -> tuple[Path, ...]:
    text = _text_of(item.origin)
    return (root / item.origin, *([root / text] if text in texts else []))


def _read_yaml(root: Path) -> tuple[dict[str, object], str]:
    """The content of data.yaml, and the file's name; empty if there is none."""
    yamls = sorted(path for end in ("*.yaml", "*.yml") for path in root.glob(end))
    chosen = [path for path in yamls if path.stem == "data"] or yamls
    if len(chosen) != 1:
        return {}, ""
    where = chosen[0].name
    content = read_yaml(read_file(chosen[0], where), where)
    return (content if isinstance(content, dict) else {}), where


def _roles(
    root: Path, content: Mapping[str, object], where: str
) -> tuple[dict[str, Split], list[str]]:
    """Folder below `root` -> split, from data.yaml; and notes on folders in it that don't exist."""
    roles: dict[str, Split] = {}
    notes = []
    for split in SPLITS:
        value = content.get(split)
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text.strip():
                continue
            parts = [part for part in text.strip().split("/") if part not in ("", ".", "..")]
            # From the whole path to its last part: it may begin with a folder of its author's.
            tails = ["/".join(parts[start:]) for start in range(len(parts))]
            found = next((tail for tail in tails if (root / tail).is_dir()), None)
            if found is None:
                notes.append(f"{where} has {split}: {text}, which is not a folder here")
            elif roles.setdefault(found, split) != split:
                raise TesseraError(
                    f"{where} lists {found} as {roles[found]} and {split}",
                    hint="an image may only be in one split",
                )
    return roles, notes


def _role(path: str, roles: Mapping[str, Split]) -> Split | None:
    """The split of the innermost folder in `roles`."""
    fitting = [folder for folder in roles if path.startswith(f"{folder}/")]
    return roles[max(fitting, key=len)] if fitting else None


def _names(
    root: Path, options: Mapping[str, str], content: Mapping[str, object], where: str
) -> tuple[str, ...]:
    found: list[object] = []
    if "classes" in options:
        found, where = list(options["classes"].split(",")), "the option classes"
    elif where:
        names = content.get("names")
        if isinstance(names, dict):
            found = _in_order(names, where)
        elif isinstance(names, list):
            found = names
    else:
        path = next((root / name for name in _NAME_FILES if (root / name).is_file()), None)
        if path is None:
            raise TesseraError(
                f"{root} has no names of classes",
                hint="add data.yaml with names, or classes.txt, or give --option classes=NAME,NAME",
            )
        where = path.name
        text = read_file(path, where, MAX_TEXT_BYTES).decode("utf-8", "replace")
        found = [line for line in text.split("\n") if line.strip()]
    if not isinstance(found, list) or not found:
        raise TesseraError(f"{where} has no list of names", hint="names: [cat, dog]")
    classes = tuple(name.strip() if isinstance(name, str) else "" for name in found)
    if not all(name and name.isprintable() for name in classes):
        raise TesseraError(f"{where} has a class whose name is empty or can't be printed")
    if len(set(classes)) != len(classes):
        raise TesseraError(f"{where} has two classes with the same name")
    return classes


def _in_order(names: dict[str, object], where: str) -> list[object]:
    """Names by their numbers, which must be 0, 1, 2, …"""
    if set(names) != {str(number) for number in range(len(names))}:
        raise TesseraError(f"{where}: the numbers of its names are not 0, 1, 2, …")
    return [names[str(number)] for number in range(len(names))]


def _lines(root: Path, texts: set[str] | frozenset[str], item: Item) -> list[str]:
    path = _text_of(item.origin)
    if path not in texts:
        return []
    data = read_inside(root, path)
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise SampleError("unreadable annotation", f"{path} is not text: {error}") from None
    return [line for line in text.split("\n") if line.strip()]


def _annotate(
    root: Path, texts: frozenset[str], classes: int, with_masks: bool, item: Item
) -> Objects:
    lines = _lines(root, texts, item)
    height, width = image_size(read_inside(root, item.origin), item.origin)
    scale = np.array([width, height], np.float64)
    boxes, labels, masks = [], [], []
    for number, line in enumerate(lines):
        where = f"{_text_of(item.origin)}, line {number + 1}"
        label, values = _parse(line, classes, where)
        corners = values.reshape(-1, 2) * scale
        if len(values) > 4:
            boxes.append([*corners.min(0), *corners.max(0)])
        else:
            boxes.append([*(corners[0] - corners[1] / 2), *(corners[0] + corners[1] / 2)])
        labels.append(label)
        if with_masks:
            if len(values) == 4:
                raise SampleError("unreadable mask", f"{where} is a box, while others are polygons")
            masks.append(rle.write(draw([corners.ravel().tolist()], height, width, where)))
    return Objects(
        clip(np.array(boxes, np.float64).reshape(-1, 4), height, width),
        np.array(labels, np.int64),
        np.zeros(len(labels), bool),
        tuple(masks) if with_masks else None,
    )


def _parse(
    line: str, classes: int, where: str
) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """(class, values in 0..1): x, y, width, height, or the corners of a polygon."""
    first, *rest = line.split()
    if not first.isdigit() or len(first) > 9 or int(first) >= classes:
        raise SampleError(
            "unknown class", f"{where}: {first[:30]!r} is not a class from 0 to {classes - 1}"
        )
    if len(rest) != 4 and (len(rest) < 6 or len(rest) % 2):
        raise SampleError(
            "unreadable annotation",
            f"{where} has {len(rest)} numbers after the class; a box has 4, a polygon an even "
            "number of at least 6",
        )
    if not all(map(_NUMBER.fullmatch, rest)):
        raise SampleError("unreadable annotation", f"{where} has a value that is not a number")
    values = np.array([float(text) for text in rest])
    if not (np.abs(values) <= 2).all():
        raise SampleError(
            "box outside the image",
            f"{where} has numbers far from 0 to 1",
            hint="YOLO's coordinates are divided by the image's width and height",
        )
    return int(first), values
