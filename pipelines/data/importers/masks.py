"""Images with a mask of their size, whose pixels are classes: binary, class values, palette, colours.

In: SOURCE/images/x.jpg with SOURCE/masks/x.png (or image, imgs with mask, label, labels), each in a
folder named for a split or not, in either order; or x.jpg with x_mask.png beside it. Out: a `Source`
for semantic segmentation. What a mask means is found by reading all of them, unless the options
`classes` or `colours` say it:

- pixels of 0 and 255 only: two classes, background and foreground (or what `classes` says)
- other grey values, and the entries of a palette: class values as they are; 255 is ignored
- colours: each is a class; `colours` says which, else they are numbered by red, green and blue and
  named #rrggbb. A colour that is not in `colours` is a bad annotation.

Masks are PNG, BMP, GIF or TIFF: JPEG changes values and is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.annotations import Mask, check_mask_size
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.mask_files import (
    MaskClasses,
    MaskPixels,
    infer_classes,
    parse_colours,
    read_mask,
)
from pipelines.data.importers.support.reading import (
    choose,
    image_size,
    list_stems,
    load,
    nearby,
    need_folder,
    read_inside,
    split_of,
)
from pipelines.data.sources import Item, Source, find_folders

NAME = "masks"
OPTIONS: Mapping[str, str] = {
    "classes": "names of the classes by their values, with commas",
    "colours": "the classes' colours: road=#804080,sky=#4682b4; a colour named ignored has no class",
    "split": "train, val or test: the split of all images, where folders don't tell",
}
_IMAGES = ("images", "image", "imgs", "img", "JPEGImages")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "SegmentationClass")
_SUFFIXES = ("", "_mask", "_label", "_labels", "_seg", "-mask")


def recognises(source: str) -> str:
    found = _find(source)
    if len(found) != 1:
        return ""
    images, masks, _ = found[0][0]
    where = "beside them" if images == masks else f"in {masks.name}"
    return f"images in {images.name} with masks {where}"


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists images and masks, and reads all masks where no option says what they mean.

    An image without a mask is an item that can't be packed.
    """
    folder = need_folder(source)
    told: Split | None = None
    if "split" in options:
        told = split_of(choose(options, "split", ("train", "val", "test"), "train"))
    items: list[Item] = []
    paths: list[str] = []
    found = _find(source)
    if len(found) != 1:
        raise TesseraError(
            f"{source} holds {len(found) or 'no'} sets of images with masks",
            hint="it must be SOURCE/images/x.jpg with SOURCE/masks/x.png, or x_mask.png beside x",
        )
    for images, masks, split in found[0]:
        pairs, alone = _pair(images, masks)
        for image, mask in [*pairs, *((name, "") for name in alone)]:
            origin = (images / image).relative_to(folder).as_posix()
            problem = None if mask else ("missing mask", f"{origin} has no mask")
            key = make_key(os.path.splitext(origin)[0])
            items.append(Item(key, origin, None, told or split, len(paths), problem))
            paths.append((masks / mask).relative_to(folder).as_posix() if mask else "")
    if "colours" in options:
        mask_classes = parse_colours(options["colours"])
    else:
        names = [name.strip() for name in options.get("classes", "").split(",") if name.strip()]
        mask_classes = infer_classes(_read_masks(folder, paths), names)
    return Source(
        name=folder.resolve().name,
        task="semantic_segmentation",
        classes=mask_classes.classes,
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, paths, mask_classes),
        files=partial(_files, folder, paths),
        notes=(mask_classes.note,),
    )


_Pair = tuple[Path, Path, Split | None]


def _find(source: str) -> list[list[_Pair]]:
    """For each set in the source its (images, masks, split) folders."""
    found: dict[Path, list[_Pair]] = {}
    for root in nearby(source):
        if not any(root.is_relative_to(other) for other in found):
            pairs = [pair for pair in _folders(root) if _pair(*pair[:2])[0]]
            if pairs:
                found[root] = pairs
    return list(found.values())


def _folders(root: Path) -> Iterator[_Pair]:
    """(images, masks, split): root/images with root/masks, root/train/images with
    root/train/masks, root/images/train with root/masks/train; the same folder for files side by
    side."""
    parts = [(place, split_of(place.name)) for place in find_folders(root)]
    for place, split in [(root, None), *(part for part in parts if part[1])]:
        images = next((place / name for name in _IMAGES if (place / name).is_dir()), None)
        masks = next((place / name for name in _MASKS if (place / name).is_dir()), None)
        if images and masks:
            inner = [part for part in find_folders(images) if (masks / part.name).is_dir()]
            for part in inner:
                yield part, masks / part.name, split_of(part.name) or split
            if not inner:
                yield images, masks, split
        else:
            yield place, place, split


def _pair(images: Path, masks: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, mask) by their names, and the images without a mask."""
    first, second = list_stems(images), list_stems(masks)
    suffixes = [s for s in _SUFFIXES if s or images != masks]
    taken = {stem + suffix for stem in first for suffix in suffixes} if images == masks else set()
    pairs, alone = [], []
    for stem, name in first.items():
        if stem in taken:
            continue
        mask = next((second[stem + s] for s in suffixes if stem + s in second), None)
        if mask:
            pairs.append((name, mask))
        else:
            alone.append(name)
    return pairs, alone


def _read_masks(folder: Path, paths: Sequence[str]) -> Iterator[tuple[str, MaskPixels]]:
    """Masks that can be read; the others are found when they are asked for."""
    for path in filter(None, paths):
        try:
            yield path, read_mask(read_inside(folder, path), path)
        except TesseraError:
            continue


def _annotate(folder: Path, paths: Sequence[str], mask_classes: MaskClasses, item: Item) -> Mask:
    path = paths[item.row]
    raw = read_mask(read_inside(folder, path), path)
    size = image_size(read_inside(folder, item.origin), item.origin)
    check_mask_size(raw.pixels.shape[:2], size, path)
    return Mask(mask_classes.apply(raw, path))


def _files(folder: Path, paths: Sequence[str], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in [paths[item.row]] if path))
