"""Masks that number objects: a file for each object, or a value or colour for each.

In: one of

- SOURCE/ID/images/x.png with SOURCE/ID/masks/*.png, or SOURCE/stage1_train/ID/…: a file for each
  object, whose pixels are those that are not 0, as the Data Science Bowl 2018 has nuclei
- SOURCE/images/x.jpg with SOURCE/masks/x.png, and the other layouts of `support/mask_pairs.py`: the
  pixels of an object have the same value (8, 16 or 32 bits), the same entry of a palette or the
  same colour; 0 and black are the background. With `divisor=1000` a value is class * 1000 + number,
  and smaller ones are no objects, as in Cityscapes' instanceIds. This has to be named by --format:
  the files don't tell it from numbers of classes.

Out: a `Source` for instance segmentation, with one class unless `divisor` is given. Boxes are those
of the masks. J. C. Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data
Science Bowl", Nature Methods 16, 2019.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from models.core.errors import TesseraError, UsageError
from pipelines.data import rle
from pipelines.data.annotations import Objects, check_mask_size
from pipelines.data.card import Split
from pipelines.data.images import make_key, open_image
from pipelines.data.importers import coco
from pipelines.data.importers.support.mask_files import read_mask
from pipelines.data.importers.support.mask_pairs import choose_mask_folders
from pipelines.data.importers.support.reading import (
    image_size,
    list_stems,
    load,
    need_folder,
    read_inside,
    split_of,
)
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source, find_folders, find_images

NAME = "instance_masks"
OPTIONS: Mapping[str, str] = {
    "class": "name of the only class; default object",
    "divisor": "a value is class * divisor + number; default: each value is an object",
    "classes": "with divisor: names of the classes that occur, in the order of their numbers",
    "ignore": "values or colours (#rrggbb) that are no objects, with commas; 0 is none",
    "masks": "the folder of the masks, where there are several",
    "mask_suffix": "what is added to an image's name for its mask: _instanceIds",
}
MAX_OBJECTS = 10_000
"""Of one image: more come from a mask of another kind."""
_VOC_BORDER = 0xE0E0C0
"""The colour of the palette's entry 255 in VOC's SegmentationObject: pixels without an object."""
_IGNORED = re.compile(r"#([0-9a-fA-F]{6})|([0-9]{1,9})")
_STAGE = re.compile(r"(stage[0-9]_)?(\w+)")


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir() or coco.recognises(source):  # made from these files, and more precise
        return ""
    for place, _ in _places(folder):
        # There may be many: the first ones suffice.
        first = filter(_is_sample, find_folders(place)[:5])
        if any(len(list_stems(inner / "images")) == 1 for inner in first):
            return f"{place.name}/ID/images with {place.name}/ID/masks"
    return ""


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the files. A sample folder without an image, or with several, is rejected."""
    folder = need_folder(source)
    items: list[Item] = []
    masks: list[tuple[str, ...]] = []
    for place, split in _places(folder):
        for inner in filter(_is_sample, find_folders(place)):
            name = inner.relative_to(folder).as_posix()
            images = [f"{name}/images/{path}" for path in find_images(inner / "images")]
            problem = None
            if len(images) != 1:
                problem = ("missing image", f"{name}/images has {len(images)} images, not 1")
            origin = images[0] if images else f"{name}/images"
            items.append(Item(make_key(name), origin, None, split, len(masks), problem))
            masks.append(tuple(f"{name}/masks/{path}" for path in find_images(inner / "masks")))
    if not items:
        return _read_numbered(folder, source, options)
    for name in [option for option in options if option != "class"]:
        raise UsageError(f"{name} is for one mask file an image", hint=f"leave {name} out")
    return Source(
        name=folder.resolve().name,
        task="instance_segmentation",
        classes=(options.get("class", "object"),),
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, masks),
        files=partial(_files, folder, masks),
        folder=folder,
    )


@dataclass(frozen=True)
class _Numbers:
    """What a value is: `classes` are the class numbers that occur, in order, for a `divisor`."""

    divisor: int
    classes: tuple[int, ...]
    ignored: frozenset[int]


def _read_numbered(folder: Path, source: str, options: Mapping[str, str]) -> Source:
    """Lists images with one mask each. Reads all masks if `divisor` is given."""
    found = choose_mask_folders(NAME, source, options, of_objects=True)
    if not found:
        raise TesseraError(
            f"{source} has no object masks",
            hint="it must be SOURCE/ID/images/x.png with SOURCE/ID/masks/*.png, or "
            "SOURCE/images/x.png with SOURCE/masks/x.png",
        )
    items: list[Item] = []
    masks: list[tuple[str, ...]] = []
    for folders in found:
        for image, mask in [*folders.pairs, *((name, "") for name in folders.alone)]:
            origin = (folders.images / image).relative_to(folder).as_posix()
            problem = None if mask else ("missing mask", f"{origin} has no mask")
            key = make_key(os.path.splitext(origin)[0])
            items.append(Item(key, origin, None, folders.split_in(image), len(masks), problem))
            path = (folders.masks / mask).relative_to(folder).as_posix()
            masks.append((path,) if mask else ())
    numbers, classes = _classes(folder, [path for paths in masks for path in paths], options)
    return Source(
        name=folder.resolve().name,
        task="instance_segmentation",
        classes=classes,
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate_numbered, folder, masks, numbers),
        files=partial(_files, folder, masks),
        folder=folder,
    )


def _classes(
    folder: Path, masks: list[str], options: Mapping[str, str]
) -> tuple[_Numbers, tuple[str, ...]]:
    ignored = frozenset(_parse_ignored(options.get("ignore", "")))
    if "divisor" not in options:
        if "classes" in options:
            raise UsageError("classes needs a divisor", hint="name one class: --option class=NAME")
        return _Numbers(0, (), ignored), (options.get("class", "object"),)
    text = options["divisor"]
    if not text.isdecimal() or not 2 <= int(text[:9]) <= 1_000_000:
        raise UsageError(f"the option divisor can't be {text!r}", hint="give a number: 1000")
    divisor = int(text)
    found: set[int] = set()
    for path in masks:
        try:
            values = np.unique(read_mask(read_inside(folder, path), path).pixels)
        except TesseraError:  # is rejected when it is packed
            continue
        found.update((values[values >= divisor] // divisor).tolist())
    numbers = _Numbers(divisor, tuple(sorted(found)), ignored)
    names = [name.strip() for name in options.get("classes", "").split(",") if name.strip()]
    names = names or [str(number) for number in numbers.classes]
    if not names or len(names) != len(numbers.classes):
        raise UsageError(
            f"the masks have the classes {', '.join(map(str, numbers.classes)) or 'none'}, "
            f"{len(names)} are named",
            hint="name each that occurs, in order",
        )
    return numbers, tuple(names)


def _parse_ignored(text: str) -> list[int]:
    values = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = _IGNORED.fullmatch(part)
        if not match:
            raise UsageError(f"the option ignore can't be {part!r}", hint="give 255 or #e0e0c0")
        values.append(int(match[1], 16) if match[1] else int(match[2]))
    return values


def _annotate_numbered(
    folder: Path, masks: list[tuple[str, ...]], numbers: _Numbers, item: Item
) -> Objects:
    (path,) = masks[item.row]
    raw = read_mask(read_inside(folder, path), path)
    size = image_size(read_inside(folder, item.origin), item.origin)
    check_mask_size(raw.pixels.shape[:2], size, path)
    ignored = {0, *numbers.ignored}
    if raw.palette and raw.palette[255:] == (_VOC_BORDER,):
        ignored.add(255)
    values = [value for value in np.unique(raw.pixels).tolist() if value not in ignored]
    values = [value for value in values if value >= numbers.divisor]
    if len(values) > MAX_OBJECTS:
        raise SampleError("too many objects", f"{path} has {len(values):,} different values")
    boxes, texts, labels = [], [], []
    for value in values:
        counts = rle.of_mask(np.ascontiguousarray(raw.pixels == value))
        boxes.append(rle.box(counts, len(raw.pixels)))
        texts.append(rle.write(counts))
        number = value // numbers.divisor if numbers.divisor else 0
        if numbers.divisor and number not in numbers.classes:
            raise SampleError("unknown class", f"{path} has the value {value}, of an unknown class")
        labels.append(numbers.classes.index(number) if numbers.divisor else 0)
    return Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.zeros(len(boxes), bool),
        tuple(texts),
    )


def _places(folder: Path) -> list[tuple[Path, Split | None]]:
    """(folder with sample folders, split): the source, and its folders named after a split."""
    places: list[tuple[Path, Split | None]] = [(folder, None)]
    for inner in find_folders(folder):
        match = _STAGE.fullmatch(inner.name)
        split = split_of(match[2]) if match else None
        if split:
            places.append((inner, split))
    return places


def _is_sample(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _annotate(folder: Path, masks: list[tuple[str, ...]], item: Item) -> Objects:
    size = image_size(read_inside(folder, item.origin), item.origin)
    boxes, texts = [], []
    for path in masks[item.row]:
        pixels = np.asarray(open_image(read_inside(folder, path), path).convert("L"))
        check_mask_size(pixels.shape, size, path)
        counts = rle.of_mask(pixels)
        if not rle.area(counts):
            raise SampleError("mask without pixels", f"{path} has no pixel other than 0")
        boxes.append(rle.box(counts, len(pixels)))
        texts.append(rle.write(counts))
    return Objects(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.zeros(len(boxes), np.int64),
        np.zeros(len(boxes), bool),
        tuple(texts),
    )


def _files(folder: Path, masks: list[tuple[str, ...]], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in masks[item.row]))
