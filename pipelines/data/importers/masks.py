"""Images with a mask of the same size, whose pixels are classes: binary, values, palette or
colours.

In: SOURCE/images/x.jpg with SOURCE/masks/x.png (or image, imgs with mask, label, labels), with or
without folders for the splits, above or below; or x.jpg with x_mask.png beside it. Out: a `Source`
for semantic segmentation. The classes are inferred from all masks, unless the option `colours`
gives them:

- only 0 and 255: two classes, background and foreground (or the names in `classes`)
- other grey values, and the entries of a palette: the values are the classes; 255 is ignored
- colours: each is a class, named in `colours`, else #rrggbb in the order of red, green and blue. A
  colour that is not in `colours` is an error.

Masks are PNG, BMP, GIF or TIFF files: JPEG changes values and is refused.
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
    "colours": "colours of the classes: road=#804080,sky=#4682b4; the name ignored means no class",
    "split": "train, val or test: the split of all images",
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
    """Lists images and masks, and reads all masks unless `colours` is given.

    An image without a mask is rejected.
    """
    folder = need_folder(source)
    fixed: Split | None = None
    if "split" in options:
        fixed = split_of(choose(options, "split", ("train", "val", "test"), "train"))
    items: list[Item] = []
    paths: list[str] = []
    found = _find(source)
    if len(found) != 1:
        raise TesseraError(
            f"{source} has {len(found) or 'no'} sets of images with masks",
            hint="it must be SOURCE/images/x.jpg with SOURCE/masks/x.png, or x_mask.png beside x",
        )
    for images, masks, split in found[0]:
        pairs, alone = _pair(images, masks)
        for image, mask in [*pairs, *((name, "") for name in alone)]:
            origin = (images / image).relative_to(folder).as_posix()
            problem = None if mask else ("missing mask", f"{origin} has no mask")
            key = make_key(os.path.splitext(origin)[0])
            items.append(Item(key, origin, None, fixed or split, len(paths), problem))
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


_Folders = tuple[Path, Path, Split | None]


def _find(source: str) -> list[list[_Folders]]:
    """For each set in the source, its folders."""
    found: dict[Path, list[_Folders]] = {}
    for root in nearby(source):
        if not any(root.is_relative_to(other) for other in found):
            pairs = [pair for pair in _folders(root) if _pair(*pair[:2])[0]]
            if pairs:
                found[root] = pairs
    return list(found.values())


def _folders(root: Path) -> Iterator[_Folders]:
    """(images, masks, split): root/images with root/masks, root/train/images with
    root/train/masks, root/images/train with root/masks/train; or the same folder twice for files
    beside each other."""
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
    """(image, mask) with matching names, and the images without a mask."""
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
    """The masks that can be read; the others are rejected when they are packed."""
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
