"""Cityscapes, as its two archives unpack into one folder.

In: SOURCE/leftImg8bit/SPLIT/CITY/x_leftImg8bit.png with
SOURCE/gtFine/SPLIT/CITY/x_gtFine_labelIds.png, or gtCoarse. Out: a `Source` for semantic
segmentation. The classes are the ids of cityscapesScripts' labels.py, 0 (unlabeled) to 33
(bicycle); with `ids=train` they are the 19 that are evaluated, and the others are ignored. Files
with instances, polygons and colours say the same in other forms. The archive of test images has
dummy masks without a class; they are left out. M. Cordts et al., "The Cityscapes Dataset for
Semantic Urban Scene Understanding", CVPR 2016.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.annotations import IGNORED, Mask, check_mask_size
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.mask_classes import MaskClasses
from pipelines.data.importers.support.mask_files import read_mask
from pipelines.data.importers.support.reading import (
    choose,
    image_size,
    load,
    nearby,
    need_folder,
    read_inside,
    split_of,
)
from pipelines.data.sources import Item, Source, find_files

NAME = "cityscapes"
OPTIONS: Mapping[str, str] = {
    "ids": "all (default): the classes are the 34 ids; train: the 19 that are evaluated",
    "labels": "gtFine (default where it is there) or gtCoarse",
}
IMAGES = "leftImg8bit"
_LABELS = ("gtFine", "gtCoarse")
_OTHERS = ("_instanceIds.png", "_color.png", "_polygons.json", "_labelTrainIds.png")
CLASSES = (
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic"),
    *("ground", "road", "sidewalk", "parking", "rail track", "building", "wall", "fence"),
    *("guard rail", "bridge", "tunnel", "pole", "polegroup", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "caravan"),
    *("trailer", "train", "motorcycle", "bicycle"),
)
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def recognises(source: str) -> str:
    root = _root(source)
    if root is None:
        return ""
    return f"{IMAGES} and {' and '.join(name for name in _LABELS if (root / name).is_dir())}"


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists images and masks. An image without a mask is rejected."""
    folder = need_folder(source)
    root = _root(source)
    if root is None:
        raise TesseraError(
            f"{source} has no {IMAGES} and {_LABELS[0]} side by side",
            hint="unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip into one folder",
        )
    there = [name for name in _LABELS if (root / name).is_dir()]
    labels = choose(options, "labels", there, there[0])
    mask_classes = _classes(choose(options, "ids", ("all", "train"), "all"))
    prefix = "" if root == folder else f"{root.relative_to(folder).as_posix()}/"
    items: list[Item] = []
    masks: list[tuple[str, ...]] = []
    left_out: list[Path] = []
    for path in find_files(root / IMAGES):
        stem, found, _ = path.rpartition(f"_{IMAGES}.")
        if not found:
            continue
        split = _split(path)
        names = [f"{labels}/{stem}_{labels}{end}" for end in ("_labelIds.png", *_OTHERS)]
        existing = [name for name in names if (root / name).is_file()]
        if split == "test":
            left_out += [root / IMAGES / path, *(root / name for name in existing)]
            continue
        origin = f"{prefix}{IMAGES}/{path}"
        problem = None
        if names[0] not in existing:
            problem = ("missing mask", f"{origin} has no mask {prefix}{names[0]}")
        key = make_key(os.path.splitext(origin)[0])
        items.append(Item(key, origin, None, split, len(masks), problem))
        masks.append(tuple(prefix + name for name in existing))
    if not items:
        raise TesseraError(f"{root / IMAGES} has no train or val images named x_{IMAGES}.png")
    notes = [mask_classes.note]
    if left_out:
        notes.append(f"{len(left_out):,} files of test are left out: its masks are not public")
    return Source(
        name=folder.resolve().name,
        task="semantic_segmentation",
        classes=mask_classes.classes,
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, masks, mask_classes),
        files=partial(_files, folder, masks),
        notes=tuple(notes),
        folder=folder,
        shared_files=tuple(left_out),
    )


def _root(source: str) -> Path | None:
    for folder in nearby(source, depth=1):
        if (folder / IMAGES).is_dir() and any((folder / name).is_dir() for name in _LABELS):
            return folder
    return None


def _split(path: str) -> Split | None:
    first = path.split("/")[0]
    return "train" if first == "train_extra" else split_of(first)


def _classes(ids: str) -> MaskClasses:
    if ids == "all":
        note = "the classes are the 34 ids; the 19 that are evaluated: --option ids=train"
        return MaskClasses(CLASSES, False, None, (IGNORED,), note)
    others = tuple(number for number in range(len(CLASSES)) if number not in TRAIN_IDS)
    names = tuple(CLASSES[number] for number in TRAIN_IDS)
    note = "the classes are the 19 that are evaluated, the others are ignored"
    return MaskClasses(names, False, TRAIN_IDS, (*others, IGNORED), note)


def _annotate(
    folder: Path, masks: Sequence[tuple[str, ...]], mask_classes: MaskClasses, item: Item
) -> Mask:
    path = masks[item.row][0]
    raw = read_mask(read_inside(folder, path), path)
    size = image_size(read_inside(folder, item.origin), item.origin)
    check_mask_size(raw.pixels.shape[:2], size, path)
    return Mask(mask_classes.apply(raw, path))


def _files(folder: Path, masks: Sequence[tuple[str, ...]], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in masks[item.row]))
