"""PASCAL VOC: an XML file with boxes for each image, and lists of names for the splits.

In: a folder with Annotations/NAME.xml, JPEGImages/NAME.jpg and ImageSets/Main/train.txt, or one
that contains it; or XML files anywhere, beside their images (Roboflow) or in folders of their own
(`support/pairs.py`), with splits by folder or by lists. Out: a `Source` for detection. Classes are
the names of all objects in alphabetical order. VOC's segmentations are read by `masks`.
M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 88, 2010.

VOC counts pixels from 1 and includes the last one: the box 1, 1, 2, 2 has four pixels. So 1 is
subtracted from left and top; a 0, which tools that count from 0 write, stays. A box whose sides
coincide in the file has no area: no annotator means a single pixel. Images are found by the name of
the XML file; its fields `path` and `filename` are never used.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Objects
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.object_lists import (
    EXIF_OPTION,
    ObjectList,
    open_canvas,
    read_exif_option,
    rotated_box,
)
from pipelines.data.importers.support.pairs import pair, split_in_folders, split_path
from pipelines.data.importers.support.reading import (
    SPLIT_ORDER,
    choose,
    load,
    nearby,
    need_folder,
    no_images,
    read_inside,
    split_of,
)
from pipelines.data.importers.support.unlabelled import UNLABELLED_OPTION, add_unlabelled
from pipelines.data.safe_parsers import read_xml
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import (
    AmbiguousError,
    Item,
    Reading,
    Source,
    find_files,
    is_image,
    read_file,
)

NAME = "voc"
OPTIONS: Mapping[str, str] = {
    "difficult": "objects marked difficult: crowd (default, not trained on), keep or drop",
    "classes": "names of the classes, with commas; default those that occur",
    "task": "detection takes the boxes of objects that have polygons too",
    **UNLABELLED_OPTION,
    **EXIF_OPTION,
}
_FOLDERS = (("Annotations", "JPEGImages"), ("annotations", "images"), ("Annotations", "images"))
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,12}(\.[0-9]{0,20})?\s*", re.ASCII)
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_ROOT = re.compile(rb"<annotation[\s>]")
_PEEKED, _PEEK_BYTES = 8, 4096
_LISTS = ("ImageSets/Main", "ImageSets", "ImageLists", "")
"""Folders that may have train.txt, below the root."""


class _Layout(NamedTuple):
    """root     folder of the data set, relative to the source and with a slash at its end
    pairs    XML file -> image, for those that have one; paths relative to the source
    alone    XML files without an image
    images   all images of the folders that have some with XML files
    usual    whether it is Annotations, JPEGImages and ImageSets; keys are then names only
    """

    root: str
    pairs: dict[str, str]
    alone: list[str]
    images: list[str]
    usual: bool


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    usual = _find_usual(source)
    if len(usual) == 1:
        return f"VOC annotations in {usual[0][1]}"
    xml = next((p for p in find_files(folder) if p.lower().endswith(".xml")), None)
    if xml is None:
        return ""
    layout = _find_layout(source, usual)
    shown = layout and [path for path in list(layout.pairs)[:_PEEKED] if _is_voc(folder / path)]
    return f"VOC annotations in {shown[0]}" if shown else ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Reads every XML file once for its classes, and again for its boxes when it is packed.

    Raises AmbiguousError for objects with polygons, unless the option task says to take the boxes.
    """
    folder = need_folder(source)
    layout = _find_layout(source, _find_usual(source))
    if layout is None or not layout.pairs:
        raise TesseraError(
            f"{source} has no data set in VOC format",
            hint="give the folder that has Annotations and JPEGImages",
        )
    difficult = choose(options, "difficult", ("crowd", "keep", "drop"), "crowd")
    splits, notes, lists = _read_lists(folder / layout.root)
    listed = {split_path(xml)[1] for xml in [*layout.pairs, *layout.alone]}
    items: list[Item] = []
    seen: set[str] = set()
    xmls: list[str] = []
    polygons = ""
    for xml, image in sorted([*layout.pairs.items(), *((xml, "") for xml in layout.alone)]):
        stem = split_path(xml)[1]
        if splits and stem not in splits:
            continue
        problem = None
        try:
            names, drawn = _read_classes(folder, xml)
            seen.update(names)
            polygons = polygons or (xml if drawn else "")
        except TesseraError as error:
            reason = getattr(error, "reason", "unreadable annotation")
            problem = (reason, f"{error.message}{': ' if error.hint else ''}{error.hint}")
        if not image:
            problem = ("missing image", f"{xml} has no image of the same name")
        key = stem if layout.usual else os.path.splitext(image or xml)[0]
        split = splits.get(stem) if splits else split_in_folders(image or xml)
        items.append(
            Item(make_key(os.fsencode(key)), image or xml, None, split, len(xmls), problem)
        )
        xmls.append(xml)
    for stem in sorted(set(splits) - listed):
        problem = ("missing image", f"{stem} is in a list and has no XML file with an image")
        items.append(Item(make_key(os.fsencode(stem)), stem, None, splits[stem], 0, problem))
    if left := len(listed - set(splits)) if splits else 0:
        notes.append(f"{left} annotations that are in no list of ImageSets are left out")
    if not items:
        raise no_images(source)
    if polygons and not choose(options, "task", ("detection", ""), ""):
        raise AmbiguousError(
            f"{polygons} has polygons, which are not read from VOC files; for masks, export the "
            "set as COCO",
            hint="--option task=detection takes the boxes alone",
            readings=[Reading(NAME, {**options, "task": "detection"}, "the boxes alone")],
        )
    classes = _classes(options, seen, items)
    if not splits:
        labelled = set(layout.pairs.values())
        without = [image for image in layout.images if image not in labelled]
        add_unlabelled(items, without, options, notes, "XML file", names_only=layout.usual)
    numbers = {name: number for number, name in enumerate(classes)}
    exif = read_exif_option(options)
    return Source(
        name=(folder / layout.root).resolve().name,
        task="detection",
        classes=classes,
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, xmls, numbers, difficult, exif),
        files=partial(_files, folder, xmls),
        notes=tuple(notes),
        folder=folder,
        shared_files=lists,
    )


def _find_usual(source: str) -> list[tuple[Path, str, str]]:
    """(root, folder of annotations, folder of images) of each data set in the usual layout."""
    found = []
    for root in nearby(source):
        for notes, images in _FOLDERS:
            if (root / images).is_dir() and (root / notes).is_dir():
                with os.scandir(root / notes) as entries:
                    if any(entry.name.endswith(".xml") for entry in entries):
                        found.append((root, notes, images))
                        break
    return found


def _find_layout(source: str, usual: Sequence[tuple[Path, str, str]]) -> _Layout | None:
    folder = Path(source)
    if len(usual) == 1:
        root, notes, images = usual[0]
        prefix = "" if root == folder else f"{root.relative_to(folder).as_posix()}/"
        files = [f"{prefix}{notes}/{name}" for name in sorted(os.listdir(root / notes))]
        xmls = [path for path in files if path.endswith(".xml")]
        found = [f"{prefix}{images}/{name}" for name in sorted(os.listdir(root / images))]
        found = [path for path in found if is_image(path)]
        if any(os.path.isfile(folder / path) for path in found):
            pairs = pair(xmls, found)
            return _Layout(prefix, pairs, [x for x in xmls if x not in pairs], found, True)
    if len(usual) > 1 and not all(split_of(root.name) for root, _, _ in usual):
        raise TesseraError(
            f"{source} has {len(usual)} data sets in VOC format",
            hint=f"give the folder of one of them, for example {usual[0][0]}",
        )
    files = list(find_files(folder))
    xmls = [path for path in files if path.lower().endswith(".xml")]
    all_images = [path for path in files if is_image(path)]
    pairs = pair(xmls, all_images)
    places = {split_path(path)[0] for path in pairs.values()}
    xml_places = {split_path(path)[0] for path in pairs}
    alone = [x for x in xmls if x not in pairs and split_path(x)[0] in xml_places]
    images_there = [path for path in all_images if split_path(path)[0] in places]
    return _Layout("", pairs, alone, images_there, False)


def _is_voc(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return bool(_ROOT.search(file.read(_PEEK_BYTES)))
    except OSError:
        return False


def _read_lists(root: Path) -> tuple[dict[str, Split], list[str], tuple[Path, ...]]:
    """Split by name, from ImageSets/Main; `trainval` is used if there is no `train`. And notes, and
    the files of the lists."""
    splits: dict[str, Split] = {}
    place = next((root / p for p in _LISTS if (root / p / "train.txt").is_file()), None)
    place = place or next((root / p for p in _LISTS if any((root / p).glob("*.txt"))), root)
    for split in SPLIT_ORDER:
        path = place / f"{split}.txt"
        if split == "train" and not path.is_file():
            path = place / "trainval.txt"
        if not path.is_file():
            continue
        text = read_file(path, path.name).decode("utf-8-sig", "surrogateescape")
        for line in text.split("\n"):
            words = line.split()
            if not words:
                continue
            name = split_path(words[0])[1] if is_image(words[0]) else words[0]
            if "/" in name or "\0" in name:
                raise TesseraError(f"{path.name} names {name[:100]!r}, which is not a file name")
            if splits.setdefault(name, split) != split:
                raise TesseraError(
                    f"{name} is in the lists {splits[name]} and {split}",
                    hint="an image may only be in one split",
                )
    if not splits:
        return {}, [], ()
    where = place.relative_to(root).as_posix()
    notes = [f"splits from {where}: {_counts(splits)}"]
    base = root / "ImageSets" if (root / "ImageSets").is_dir() else place
    lists = (base / path for path in find_files(base) if path.endswith(".txt"))
    return splits, notes, tuple(lists if base != root else sorted(root.glob("*.txt")))


def _counts(splits: Mapping[str, Split]) -> str:
    values = list(splits.values())
    return ", ".join(f"{split} {values.count(split)}" for split in SPLIT_ORDER if split in values)


def _classes(
    options: Mapping[str, str], seen: Iterable[str], items: Sequence[Item]
) -> tuple[str, ...]:
    if "classes" not in options:
        if not seen:
            problems = [item.problem[1] for item in items if item.problem]
            if len(problems) == len(items):
                raise TesseraError(f"no annotation can be used: {problems[0]}")
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


def _files(folder: Path, xmls: Sequence[str], item: Item) -> tuple[Path, ...]:
    image = folder / item.origin
    return (image,) if item.row < 0 else (image, folder / xmls[item.row])


def _parse(folder: Path, path: str) -> Element:
    root = read_xml(read_inside(folder, path), path)
    if root.tag != "annotation":
        raise SampleError(
            "unreadable annotation", f"{path}: its root is {root.tag[:50]!r}, not annotation"
        )
    return root


def _read_classes(folder: Path, path: str) -> tuple[set[str], bool]:
    """The names of a file's objects, of which those without one are damaged; and whether an object
    has a polygon, as those of Roboflow and RectLabel may."""
    objects = _parse(folder, path).findall("object")
    drawn = any(found.find("polygon") is not None for found in objects)
    return {_class(found) for found in objects} - {""}, drawn


def _class(found: Element) -> str:
    name = (found.findtext("name") or "").strip()
    return name if name.isprintable() and len(name) <= 200 else ""


def _annotate(
    folder: Path,
    xmls: Sequence[str],
    numbers: Mapping[str, int],
    difficult: str,
    exif: str,
    item: Item,
) -> Objects:
    data = read_inside(folder, item.origin)
    if item.row < 0:
        return ObjectList(open_canvas(data, item.origin, exif), with_masks=False).finish()
    path = xmls[item.row]
    root = _parse(folder, path)
    stated = [int(_number(root.find(f"size/{side}"), 0)) for side in ("height", "width")]
    objects = ObjectList(open_canvas(data, item.origin, exif, stated), with_masks=False)
    for number, found in enumerate(root.findall("object")):
        marked = (found.findtext("difficult") or "0").strip() == "1"
        if marked and difficult == "drop":
            continue
        name = _class(found)
        with objects.one(numbers.get(name)):
            if name not in numbers:
                shown = (found.findtext("name") or "")[:50]
                raise SampleError(
                    "unknown class", f"{path}: object {number} has the class {shown!r}"
                )
            where = f"{path}: object {number} ({name})"
            crowd = marked and difficult == "crowd"
            objects.add(numbers[name], _box(found, where), where, crowd=crowd)
    return objects.finish()


def _rotation(found: Element) -> float:
    """The angle of an object in degrees: an attribute in CVAT's files."""
    for attribute in found.findall("attributes/attribute"):
        if (attribute.findtext("name") or "").strip() == "rotation":
            return _number(attribute.find("value"), 0)
    return 0


def _box(found: Element, where: str) -> list[float]:
    """Left, top, right, bottom, from 0."""
    if angle := _rotation(found) % 360:
        raise rotated_box(where, angle)
    angle = _number(found.find("robndbox/angle"), 0)  # of roLabelImg, in radians
    if found.find("robndbox") is not None and found.find("bndbox") is None:
        raise rotated_box(where, math.degrees(angle))
    left, top, right, bottom = (_number(found.find(f"bndbox/{s}"), math.nan) for s in _SIDES)
    if left == right or top == bottom:
        shown = ", ".join(f"{side:g}" for side in (left, top, right, bottom))
        raise SampleError("box without area", f"{where} has the box ({shown}), without area")
    return [left - (left >= 1), top - (top >= 1), right, bottom]


def _number(found: Element | None, missing: float) -> float:
    text = "" if found is None else (found.text or "")
    return float(text) if _NUMBER.fullmatch(text) else missing
