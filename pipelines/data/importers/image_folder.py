"""A folder for each class: SOURCE/CLASS/…/IMAGE.jpg, or SOURCE/train/CLASS/…, SOURCE/test/CLASS/….

In: a folder. Out: a `Source` for classification. Classes are the names of the class folders in
alphabetical order, as in torchvision's `ImageFolder`. Hidden files are ignored; files without the
suffix of an image are ignored and counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.images import make_key
from pipelines.data.importers.support.reading import IMAGE_NAMES, LABEL_NAMES, SPLIT_NAMES
from pipelines.data.sources import (
    Item,
    Source,
    find_files,
    find_folders,
    find_images,
    is_image,
    read_file,
)

NAME = "image_folder"
OPTIONS: Mapping[str, str] = {}


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    splits = _find_splits(folder)
    places = [place for part in _parts(folder, splits) for place in find_folders(part)]
    first = {place: next(find_images(place), None) for place in places}
    names = {place.name for place in places if first[place]}
    # A single folder has no classes: its images have no labels, or a table has them.
    if len(names) < 2 or _is_other_layout(first) or "train" in names <= SPLIT_NAMES.keys():
        return ""
    return f"{len(names)} class folders" + (f" in each of {', '.join(splits)}" if splits else "")


def _is_other_layout(first: Mapping[Path, str | None]) -> bool:
    """Whether the folders, given with their first images, have labels in files instead."""
    for place, path in first.items():
        if path is None and place.name.lower() in LABEL_NAMES:
            return True
        if path and IMAGE_NAMES & {part.lower() for part in (place.name, *path.split("/")[:-1])}:
            return True
    return False


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the files. Raises TesseraError for a class folder without images, and for images that
    are in no class folder."""
    folder = Path(source)
    if not folder.is_dir():
        raise TesseraError(f"there is no folder {source}")
    splits = _find_splits(folder)
    places = [place for part in _parts(folder, splits) for place in find_folders(part)]
    classes = tuple(sorted({_check_name(place.name) for place in places}))
    numbers = {name: number for number, name in enumerate(classes)}
    items: list[Item] = []
    others = 0
    for path in find_files(folder):
        if not is_image(path):
            others += 1
            continue
        split, name = _split_and_class(path, splits)
        if name not in numbers:
            raise TesseraError(
                f"{source}: the image {path} is in no class folder",
                hint="move it into one, or out of the source",
            )
        items.append(Item(make_key(os.path.splitext(path)[0]), path, numbers[name], split))
    if not items:
        raise TesseraError(
            f"{source} has no images in class folders", hint="it must be SOURCE/CLASS/IMAGE.jpg"
        )
    _check_filled(folder, places, items, depth=2 if splits else 1)
    notes = (f"{others} files without the suffix of an image are left out",) if others else ()
    name = folder.resolve().name
    return Source(
        name=name,
        task="classification",
        classes=classes,
        items=items,
        load=partial(_load, folder),
        files=partial(_files, folder),
        notes=notes,
    )


def _split_and_class(path: str, splits: Mapping[str, Split]) -> tuple[Split | None, str]:
    """(split, class) of an image from its path; the class is empty if it is in no class folder."""
    first, *rest = path.split("/")
    if not splits:
        return None, first if rest else ""
    return splits.get(first), rest[0] if first in splits and len(rest) > 1 else ""


def _check_filled(folder: Path, places: list[Path], items: list[Item], *, depth: int) -> None:
    filled = {tuple(item.origin.split("/")[:depth]) for item in items}
    empty = [p.relative_to(folder) for p in places if p.relative_to(folder).parts not in filled]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise TesseraError(
            f"{folder}: the class folder {empty[0]}{more} has no images",
            hint="add images or remove the folder",
        )


def _load(folder: Path, item: Item) -> bytes:
    return read_file(folder / item.origin, item.origin)


def _files(folder: Path, item: Item) -> tuple[Path, ...]:
    return (folder / item.origin,)


def _find_splits(folder: Path) -> dict[str, Split]:
    """Folder name -> split; empty if the class folders are in `folder` itself."""
    found: dict[str, Split] = {}
    for place in find_folders(folder):
        split = SPLIT_NAMES.get(place.name.lower())
        if split in found.values():
            raise TesseraError(
                f"{folder} has two folders for {split}, {place.name} is one of them",
                hint="merge them",
            )
        if split:
            found[place.name] = split
    # A class may be named "test": these are splits only if there is a `train` with class folders.
    train = next((name for name, split in found.items() if split == "train"), None)
    return found if train and find_folders(folder / train) else {}


def _parts(folder: Path, splits: Mapping[str, Split]) -> list[Path]:
    return [folder / name for name in splits] or [folder]


def _check_name(name: str) -> str:
    if not name.isprintable():  # also names that are not UTF-8
        raise TesseraError(f"the class folder {name!r} has a name that can't be printed")
    return name
