"""PASCAL VOC: an XML file with boxes for each image, and lists of names for the splits.

In: a folder with Annotations/NAME.xml, JPEGImages/NAME.jpg and ImageSets/Main/train.txt, or one
that contains it; also annotations/ with images/, with or without lists. Out: a `Source` for
detection. Classes are the names of all objects in alphabetical order. VOC's segmentations are read
by `masks`. M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 88, 2010.

VOC counts pixels from 1 and includes the last one: the box 1, 1, 2, 2 has four pixels. So 1 is
subtracted from left and top; a 0, which tools that count from 0 write, stays. A box whose sides
coincide in the file has no area: no annotator means a single pixel. Images are found by the name of
the XML file; its fields `path` and `filename` are never used.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Objects, clip
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.reading import (
    SPLIT_ORDER,
    check_stated_size,
    choose,
    image_size,
    list_stems,
    load,
    nearby,
    need_folder,
    read_inside,
)
from pipelines.data.safe_parsers import read_xml
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source, read_file

NAME = "voc"
OPTIONS: Mapping[str, str] = {
    "difficult": "objects marked difficult: crowd (default, not trained on), keep or drop",
    "classes": "names of the classes, with commas; default those that occur",
}
_FOLDERS = (("Annotations", "JPEGImages"), ("annotations", "images"), ("Annotations", "images"))
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,12}(\.[0-9]{0,20})?\s*", re.ASCII)
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def recognises(source: str) -> str:
    found = _find(source)
    return f"VOC annotations in {found[0][1]}" if len(found) == 1 else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads every XML file once for its classes, and again for its boxes when it is packed."""
    folder = need_folder(source)
    found = _find(source)
    if len(found) != 1:
        raise TesseraError(
            f"{source} has {len(found) or 'no'} data sets in VOC format",
            hint="give the folder that has Annotations and JPEGImages",
        )
    root, annotations, images = found[0]
    difficult = choose(options, "difficult", ("crowd", "keep", "drop"), "crowd")
    splits, notes = _splits(root)
    stems = list_stems(root / images)
    names = {p.name[:-4] for p in (root / annotations).iterdir() if p.name.endswith(".xml")}
    chosen = sorted(splits or names)
    prefix = "" if root == folder else f"{root.relative_to(folder).as_posix()}/"
    items: list[Item] = []
    seen: set[str] = set()
    for stem in chosen:
        path = f"{prefix}{annotations}/{stem}.xml"
        problem = None
        try:
            seen.update(_class(found) for found in _objects(_parse(folder, path)))
        except TesseraError as error:
            problem = (getattr(error, "reason", "unreadable annotation"), error.message)
        if stem not in stems:
            problem = ("missing image", f"{path} has no image of the same name in {images}")
        origin = f"{prefix}{images}/{stems.get(stem, stem)}"
        items.append(Item(make_key(os.fsencode(stem)), origin, None, splits.get(stem), 0, problem))
    left = len(names - set(chosen))
    if left:
        notes.append(f"{left} annotations that are in no list of ImageSets are left out")
    classes = _classes(options, seen)
    name = root.resolve().name
    numbers = {name: number for number, name in enumerate(classes)}
    annotate = partial(_annotate, folder, f"{prefix}{annotations}", numbers, difficult)
    files = partial(_files, folder, f"{prefix}{annotations}")
    return Source(
        name, "detection", classes, items, partial(load, folder), annotate, files, tuple(notes)
    )


def _find(source: str) -> list[tuple[Path, str, str]]:
    """(root, folder of annotations, folder of images) of each data set in VOC format."""
    found = []
    for root in nearby(source):
        for notes, images in _FOLDERS:
            if (root / images).is_dir() and (root / notes).is_dir():
                with os.scandir(root / notes) as entries:
                    if any(entry.name.endswith(".xml") for entry in entries):
                        found.append((root, notes, images))
                        break
    return found


def _splits(root: Path) -> tuple[dict[str, Split], list[str]]:
    """Split by name, from ImageSets/Main; `trainval` is used if there is no `train`."""
    lists = root / "ImageSets" / "Main"
    splits: dict[str, Split] = {}
    for split in SPLIT_ORDER:
        path = lists / f"{split}.txt"
        if split == "train" and not path.is_file():
            path = lists / "trainval.txt"
        if not path.is_file():
            continue
        text = read_file(path, path.name).decode("utf-8", "surrogateescape")
        for line in text.split("\n"):
            words = line.split()
            if not words:
                continue
            name = words[0]
            if "/" in name or "\0" in name:
                raise TesseraError(f"{path.name} names {name[:100]!r}, which is not a file name")
            if splits.setdefault(name, split) != split:
                raise TesseraError(
                    f"{name} is in the lists {splits[name]} and {split}",
                    hint="an image may only be in one split",
                )
    return splits, [f"splits from ImageSets/Main: {_counts(splits)}"] if splits else []


def _counts(splits: Mapping[str, Split]) -> str:
    values = list(splits.values())
    return ", ".join(f"{split} {values.count(split)}" for split in SPLIT_ORDER if split in values)


def _classes(options: Mapping[str, str], seen: Iterable[str]) -> tuple[str, ...]:
    if "classes" not in options:
        if not seen:
            raise TesseraError(
                "the annotations have no objects",
                hint="give the classes: --option classes=NAME,NAME",
            )
        return tuple(sorted(seen))
    given = tuple(name.strip() for name in options["classes"].split(","))
    if not all(given) or len(set(given)) != len(given):
        raise UsageError(
            f"the option classes {options['classes']!r} has an empty or duplicate name"
        )
    return given


def _files(folder: Path, annotations: str, item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, folder / _path(annotations, item))


def _path(annotations: str, item: Item) -> str:
    return f"{annotations}/{os.path.splitext(os.path.basename(item.origin))[0]}.xml"


def _parse(folder: Path, path: str) -> Element:
    root = read_xml(read_inside(folder, path), path)
    if root.tag != "annotation":
        raise SampleError(
            "unreadable annotation", f"{path}: its root is {root.tag[:50]!r}, not annotation"
        )
    return root


def _objects(root: Element) -> list[Element]:
    return root.findall("object")


def _class(found: Element) -> str:
    name = (found.findtext("name") or "").strip()
    if not name or not name.isprintable() or len(name) > 200:
        raise SampleError("unknown class", f"an object has the name {name[:50]!r}")
    return name


def _annotate(
    folder: Path, annotations: str, numbers: Mapping[str, int], difficult: str, item: Item
) -> Objects:
    path = _path(annotations, item)
    root = _parse(folder, path)
    height, width = image_size(read_inside(folder, item.origin), item.origin)
    stated = [_number(root.find(f"size/{side}"), 0) for side in ("height", "width")]
    if all(stated):
        check_stated_size((int(stated[0]), int(stated[1])), (height, width), item.origin)
    boxes, labels, crowd = [], [], []
    for number, found in enumerate(_objects(root)):
        marked = (found.findtext("difficult") or "0").strip() == "1"
        if marked and difficult == "drop":
            continue
        name = _class(found)
        if name not in numbers:
            raise SampleError("unknown class", f"{path}: object {number} has the class {name!r}")
        boxes.append(_box(found, f"{path}: object {number} ({name})"))
        labels.append(numbers[name])
        crowd.append(marked and difficult == "crowd")
    return Objects(
        clip(np.array(boxes, np.float64).reshape(-1, 4), height, width),
        np.array(labels, np.int64),
        np.array(crowd, bool),
    )


def _box(found: Element, where: str) -> list[float]:
    """Left, top, right, bottom, from 0."""
    left, top, right, bottom = (_number(found.find(f"bndbox/{s}"), math.nan) for s in _SIDES)
    if left == right or top == bottom:
        shown = ", ".join(f"{side:g}" for side in (left, top, right, bottom))
        raise SampleError("box without area", f"{where} has the box ({shown}), without area")
    return [left - (left >= 1), top - (top >= 1), right, bottom]


def _number(found: Element | None, missing: float) -> float:
    text = "" if found is None else (found.text or "")
    return float(text) if _NUMBER.fullmatch(text) else missing
