"""Images with a mask of the same size, whose pixels are classes: binary, values, palette or
colours.

In: SOURCE/images/x.jpg with SOURCE/masks/x.png, train/x.png with trainannot/x.png, and the like,
with or without folders for the splits, above or below; or x.jpg with x_mask.png beside it
(`support/mask_pairs.py`). Out: a `Source` for semantic segmentation. The classes are inferred from
all masks, unless an option gives them (`support/mask_classes.py`):

- only 0 and 255: two classes, background and foreground (or the names in `classes`)
- few grey values that are far apart, such as 0, 128 and 255: each is a class, 255 too
- other grey values: the values are the classes; 255 is ignored
- a palette: the same in all files, its entries are the classes; otherwise its colours are
- colours: each is a class, named in `colours` or in a list of classes beside the masks
  (`support/mask_tables.py`), else #rrggbb in the order of red, green and blue. A colour that is not
  in a list is an error.

Masks with soft edges, and values that could be numbers of objects, are refused with the option for
each reading. Masks are PNG, BMP, GIF or TIFF files: JPEG changes values and is refused, unless
`threshold` makes two classes of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Mask, check_mask_size
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers import cityscapes, instance_masks
from pipelines.data.importers.support.mask_classes import (
    MaskClasses,
    Palette,
    infer_classes,
    of_named_colours,
    of_threshold,
    parse_colours,
)
from pipelines.data.importers.support.mask_files import (
    MaskPixels,
    looks_like_mask,
    read_mask,
    read_soft_mask,
    turn_upright,
)
from pipelines.data.importers.support.mask_lists import find_lists
from pipelines.data.importers.support.mask_pairs import (
    IMAGE_WORDS,
    MaskFolders,
    choose_mask_folders,
    find_mask_folders,
    names_masks,
)
from pipelines.data.importers.support.mask_tables import find_class_list
from pipelines.data.importers.support.object_lists import (
    EXIF_OPTION,
    open_canvas,
    read_exif_option,
)
from pipelines.data.importers.support.reading import (
    choose,
    image_size,
    load,
    need_folder,
    read_inside,
    split_of,
)
from pipelines.data.sample_error import SampleError
from pipelines.data.sources import Item, Source, find_folders

NAME = "masks"
OPTIONS: Mapping[str, str] = {
    "classes": "names of the classes by their values, with commas",
    "colours": "colours of the classes: road=#804080,sky=#4682b4; the name ignored means no class",
    "values": "grey values of the classes: cup=0,disc=128; the name ignored means no class",
    "palette": "index or colour: whether the entries of palettes are the classes, or their colours",
    "threshold": "two classes: pixels with this brightness and more, from 1 to 255, and the others",
    "masks": "the folder of the masks, where there are several",
    "mask_suffix": "what is added to an image's name for its mask: _segmentation",
    "split": "train, val or test: the split of all images",
    **EXIF_OPTION,
}
_PEEKED = 3
_GIVEN_CLASSES = ("classes", "colours", "values", "threshold")


def recognises(source: str) -> str:
    if not Path(source).is_dir():
        return ""
    if cityscapes.recognises(source) or instance_masks.recognises(source):
        return ""
    found = [folders for folders in find_mask_folders(source) if _holds_masks(folders)]
    if not found:
        return ""
    more = f", and {len(found) - 1} more of such folders" if len(found) > 1 else ""
    return found[0].described + more


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists images and masks, and reads all masks unless `colours` or `threshold` is given.

    An image without a mask is rejected.
    """
    folder = need_folder(source)
    fixed: Split | None = None
    if "split" in options:
        fixed = split_of(choose(options, "split", ("train", "val", "test"), "train"))
    items: list[Item] = []
    paths: list[str] = []
    found = _choose_folders(source, options)
    shared: list[Path] = []
    for folders in found:
        if lists := find_lists(folders):
            folders = lists.keep_listed(folders)
            shared += lists.files
        for image, mask in [*folders.pairs, *((name, "") for name in folders.alone)]:
            origin = (folders.images / image).relative_to(folder).as_posix()
            problem = None if mask else ("missing mask", f"{origin} has no mask")
            key = make_key(os.path.splitext(origin)[0])
            listed = lists.split_of(image) if lists else folders.split_in(image)
            split = fixed or listed
            items.append(Item(key, origin, None, split, len(paths), problem))
            paths.append((folders.masks / mask).relative_to(folder).as_posix() if mask else "")
    mask_classes, table = _find_classes(folder, found, paths, options)
    return Source(
        name=folder.resolve().name,
        task="semantic_segmentation",
        classes=mask_classes.classes,
        items=items,
        load=partial(load, folder),
        annotate=partial(_annotate, folder, paths, mask_classes, read_exif_option(options)),
        files=partial(_files, folder, paths),
        notes=(mask_classes.note,),
        folder=folder,
        shared_files=(*shared, *table),
    )


def _holds_masks(folders: MaskFolders) -> bool:
    """Whether the first masks look like masks: folders of photos may be called mask and no_mask."""
    for _, mask in folders.pairs[:_PEEKED]:
        try:
            if not looks_like_mask(read_inside(folders.masks, mask), mask):
                return False
        except TesseraError:  # is rejected when it is packed
            continue
    return True


def _choose_folders(source: str, options: Mapping[str, str]) -> list[MaskFolders]:
    found = choose_mask_folders(NAME, source, options)
    if not found:
        raise _nothing_found(source)
    return found


def _nothing_found(source: str) -> TesseraError:
    inner = find_folders(Path(source))
    masks = [folder.name for folder in inner if names_masks(folder.name)]
    images = [folder.name for folder in inner if folder.name.lower() in IMAGE_WORDS]
    if masks and images:
        return TesseraError(
            f"{source} has {images[0]} and {masks[0]}, but no mask has the name of an image",
            hint="say what is added to an image's name for its mask: --option mask_suffix=_SUFFIX",
        )
    return TesseraError(
        f"{source} has no sets of images with masks",
        hint="it must be SOURCE/images/x.jpg with SOURCE/masks/x.png, or x_mask.png beside x",
    )


def _find_classes(
    folder: Path, found: Sequence[MaskFolders], paths: Sequence[str], options: Mapping[str, str]
) -> tuple[MaskClasses, tuple[Path, ...]]:
    """The classes, and the file that lists them, if there is one."""
    names = [name.strip() for name in options.get("classes", "").split(",") if name.strip()]
    given = [name for name in _GIVEN_CLASSES[1:] if name in options]
    if len(given) > 1:
        raise UsageError(f"the options {' and '.join(given)} don't go together")
    beside = [folder, *(place for one in found for place in (one.masks, one.masks.parent))]
    listed = find_class_list(dict.fromkeys(beside))
    shared = (listed.file,) if listed else ()
    if "colours" in options:
        return parse_colours(options["colours"]), shared
    if "threshold" in options:
        return of_threshold(_parse_threshold(options["threshold"]), names), shared
    masks = _read_masks(folder, paths)
    if listed and not names and "values" not in options:
        first = next(masks, None)
        if listed.colours and first and first[1].resolved().colours:
            where = listed.file.relative_to(folder).as_posix()
            return of_named_colours(listed.colours, (), where), shared
        if not listed.colours:
            names = list(listed.names)
        masks = _read_masks(folder, paths)
    palette = choose(options, "palette", ("index", "colour", ""), "") or None
    return infer_classes(
        masks, names, values=options.get("values", ""), palette=cast(Palette | None, palette)
    ), shared


def _parse_threshold(text: str) -> int:
    if text.isdecimal() and 1 <= int(text[:4]) <= 255:
        return int(text)
    raise UsageError(f"the option threshold can't be {text!r}", hint="give 1 to 255, such as 128")


def _read_masks(folder: Path, paths: Sequence[str]) -> Iterator[tuple[str, MaskPixels]]:
    """The masks that can be read; the others are rejected when they are packed. Raises the error of
    the first one if none can be read."""
    first: TesseraError | None = None
    count = 0
    for path in filter(None, paths):
        try:
            mask = read_mask(read_inside(folder, path), path)
        except TesseraError as error:
            first = first or error
            continue
        count += 1
        yield path, mask
    if first and not count:
        raise first


def _annotate(
    folder: Path, paths: Sequence[str], mask_classes: MaskClasses, exif: str, item: Item
) -> Mask:
    path = paths[item.row]
    data = read_inside(folder, path)
    if mask_classes.threshold is None:
        raw = read_mask(data, path)
    else:
        raw = read_soft_mask(data, path, mask_classes.threshold)
    image = read_inside(folder, item.origin)
    size = (raw.pixels.shape[0], raw.pixels.shape[1])
    try:
        canvas = open_canvas(image, item.origin, exif, size)
    except SampleError as error:
        if error.reason == "annotation of another size":
            check_mask_size(size, image_size(image, item.origin), path)
        raise
    return Mask(turn_upright(mask_classes.apply(raw, path), canvas.orientation))


def _files(folder: Path, paths: Sequence[str], item: Item) -> tuple[Path, ...]:
    return (folder / item.origin, *(folder / path for path in [paths[item.row]] if path))
