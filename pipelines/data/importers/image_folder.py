"""A folder for each class: SOURCE/CLASS/…/IMAGE.jpg, or SOURCE/train/CLASS/…, SOURCE/test/CLASS/….

In: a folder. Out: a `Source` for classification. Classes are the names of the class folders in
alphabetical order, as in torchvision's `ImageFolder`. Hidden files are ignored. Folders whose names
differ only in the Unicode form of their letters are one class: copying between file systems makes
such pairs, and they look the same.

The class folders may also lie in one folder around all of them, in a folder of the same split
(seg_train/seg_train), in parts (part_1/CLASS, part_2/CLASS), or around the splits (CLASS/train).
Where class folders have folders with images instead of images, the option `class_from` says which
folder names the class, or that the name of the file does.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from models.core.errors import TesseraError
from pipelines.data.card import Split
from pipelines.data.importers.support.reading import (
    IMAGE_NAMES,
    LABEL_NAMES,
    choose,
    class_in_name,
    find_splits,
    make_keys,
    split_of,
)
from pipelines.data.sources import (
    AmbiguousError,
    Item,
    Reading,
    Source,
    find_files,
    find_folders,
    find_images,
    is_image,
    read_file,
)

NAME = "image_folder"
CLASS_FROM = ("parent", "leaf", "path", "name")
OPTIONS: Mapping[str, str] = {
    "class_from": "parent: the outermost folder names the class (default), leaf: the innermost, "
    "path: all folders, name: the words before the number in a file's name, cat.12.jpg",
}
_PART = re.compile(
    r"(.*?[-_ .])?(part|batch|chunk|shard|vol|volume|disc|disk|images?|imgs?|photos?)[-_ .]*[0-9]+",
    re.I,
)
_LABEL_WORD = re.compile(r"mask|label|annot|ground.?truth|(^|[-_ .])gt", re.I)


class _Base(NamedTuple):
    """A folder with class folders in it. `inner`: each of these has folders for the splits."""

    path: Path
    split: Split | None = None
    inner: Mapping[str, Split] = {}


def recognises(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return ""
    bases = _find_bases(folder)
    places = [place for base in bases for place in find_folders(base.path)]
    first = {place: next(find_images(place), None) for place in places}
    names = {_composed(place.name) for place in places if first[place]}
    # A single folder has no classes: its images have no labels, or a table has them.
    if len(names) < 2 or _is_other_layout(first) or _are_parts(names):
        return ""
    found = find_splits(names)
    if "train" in found.values() and len(found) == len(names):
        return ""
    splits = [base.path.relative_to(folder).as_posix() for base in bases if base.split]
    splits = splits or list(bases[0].inner)
    return f"{len(names)} class folders" + (f" in each of {', '.join(splits)}" if splits else "")


def _is_other_layout(first: Mapping[Path, str | None]) -> bool:
    """Whether the folders, given with their first images, have labels in files instead."""
    for place, path in first.items():
        if place.name.lower() in (LABEL_NAMES if path is None else IMAGE_NAMES):
            return True
        folders = (path or "").lower().split("/")[:-1]
        for depth, name in enumerate(folders):
            beside = place.joinpath(*(path or "").split("/")[:depth])
            if name in IMAGE_NAMES and any(
                inner.name.lower() in LABEL_NAMES for inner in find_folders(beside)
            ):
                return True
    labelled = {bool(_LABEL_WORD.search(place.name)) for place, path in first.items() if path}
    return len(labelled) == 2


def read(source: str, options: Mapping[str, str]) -> Source:
    """Lists the files. Raises TesseraError for a class folder without images, and for images that
    are in no class folder; AmbiguousError if the folders can be classes in several ways."""
    folder = Path(source)
    if not folder.is_dir():
        raise TesseraError(f"there is no folder {source}")
    class_from = choose(options, "class_from", CLASS_FROM, "parent")
    paths = list(find_images(folder))
    if class_from == "name":
        return _make_source(
            folder, paths, [_named_class(path) for path in paths], [_split_in(p) for p in paths]
        )
    bases = _find_bases(folder)
    starts = {_start(base.path, folder): base for base in bases}
    located = [_locate(source, path, starts) for path in paths]
    if not located:
        raise TesseraError(
            f"{source} has no images in class folders", hint="it must be SOURCE/CLASS/IMAGE.jpg"
        )
    if "class_from" not in options:
        _check_levels(source, [parts for _, parts in located])
    _check_filled(folder, bases, paths)
    labels = [_class_name(parts, class_from) for _, parts in located]
    found = _make_source(folder, paths, labels, [split for split, _ in located])
    return replace(found, notes=(*found.notes, *_joined_splits(_unwrap(folder), bases)))


def _make_source(
    folder: Path, paths: Sequence[str], labels: Sequence[str], splits: Sequence[Split | None]
) -> Source:
    name_of, twice = _join_forms(set(map(_check_name, labels)))
    classes = tuple(sorted(set(name_of.values())))
    numbers = {label: classes.index(name) for label, name in name_of.items()}
    items = [
        Item(key, path, numbers[label], split)
        for key, path, label, split in zip(make_keys(paths), paths, labels, splits)
    ]
    return Source(
        name=folder.resolve().name,
        task="classification",
        classes=classes,
        items=items,
        load=partial(_load, folder),
        files=partial(_files, folder),
        folder=folder,
        notes=tuple(
            f"folders named {name} in two Unicode forms, which look the same: they are one class"
            for name in twice
        ),
    )


def _composed(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _join_forms(labels: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Label -> name of its class, the composed form if there are others; and those names."""
    forms: dict[str, list[str]] = {}
    for label in labels:
        forms.setdefault(_composed(label), []).append(label)
    names = {
        label: name if len(alike) > 1 else label for name, alike in forms.items() for label in alike
    }
    return names, sorted(name for name, alike in forms.items() if len(alike) > 1)


def _joined_splits(root: Path, bases: Sequence[_Base]) -> list[str]:
    """A line for each split that is read from several folders, but for parts of one folder."""
    folders: dict[str, set[str]] = {}
    for base in bases:
        if base.split:
            folders.setdefault(base.split, set()).add(base.path.relative_to(root).parts[0])
    return [
        f"the folders {' and '.join(sorted(names))} are both read as {split}"
        for split, names in folders.items()
        if len(names) > 1
    ]


def _find_bases(folder: Path) -> list[_Base]:
    """The folders that have class folders in them."""
    root = _unwrap(folder)
    inner = find_folders(root)
    if splits := _find_splits(root, inner):
        return [
            base
            for place in inner
            if place.name in splits
            for base in _join_parts(_unwrap_split(place), splits[place.name])
        ]
    bases = _join_parts(root, None)
    if len(bases) == 1:
        names = [{place.name for place in find_folders(place)} for place in inner]
        found = find_splits(names[0]) if names else {}
        if "train" in found.values() and all(len(n) and find_splits(n).keys() == n for n in names):
            return [_Base(root, None, find_splits(set().union(*names)))]
    return bases


def _unwrap(folder: Path) -> Path:
    """The folder with the class folders or splits in it: `folder`, or the only one in it, as many
    archives have a folder around all others."""
    inner = find_folders(folder)
    if len(inner) != 1 or find_splits([inner[0].name]) or _has_images(folder):
        return folder
    only = inner[0]
    deeper = find_folders(only)
    if only.name.lower() in LABEL_NAMES or not deeper:
        return folder
    if len(deeper) > 1 or find_splits([deeper[0].name]):
        return only
    unwrapped = _unwrap(only)
    return folder if unwrapped == only else unwrapped


def _unwrap_split(place: Path) -> Path:
    """The folder of a split, or the folder of the same split in it: seg_train/seg_train."""
    inner = find_folders(place)
    if len(inner) == 1 and not _has_images(place):
        mine, other = (list(find_splits([p.name]).values()) for p in (place, inner[0]))
        if inner[0].name == place.name or (other and mine == other):
            return inner[0]
    return place


def _join_parts(root: Path, split: Split | None) -> list[_Base]:
    inner = find_folders(root)
    if _are_parts([place.name for place in inner]) and all(map(find_folders, inner)):
        return [_Base(place, split) for place in inner]
    return [_Base(root, split)]


def _are_parts(names: Sequence[str] | set[str]) -> bool:
    """Whether folders are parts of one whole: images_part_1, images_part_2."""
    stems = {re.sub(r"[0-9]+", "", name) for name in names}
    return len(names) > 1 and len(stems) == 1 and all(map(_PART.fullmatch, names))


def _find_splits(root: Path, inner: Sequence[Path]) -> dict[str, Split]:
    """Folder name -> split; empty if the class folders are in `root` itself."""
    found = find_splits([place.name for place in inner])
    # A class may be named "test": these are splits only if there is a `train` with class folders.
    if not any(split == "train" and find_folders(root / name) for name, split in found.items()):
        return {}
    words: dict[Split, set[str]] = {}
    for name, split in found.items():
        words.setdefault(split, set()).add(re.sub(r"[\W\d_]+", "", _composed(name)).lower())
    for split, alike in words.items():
        if len(alike) > 1:
            names = ", ".join(name for name in found if found[name] == split)
            raise TesseraError(
                f"{root} has two folders for {split}: {names}",
                hint="merge them, or move one out of the source",
            )
    return found


def _has_images(folder: Path) -> bool:
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return any(is_image(entry.name) and not entry.is_dir() for entry in visible)


def _start(place: Path, folder: Path) -> str:
    return "" if place == folder else place.relative_to(folder).as_posix() + "/"


def _locate(
    source: str, path: str, starts: Mapping[str, _Base]
) -> tuple[Split | None, tuple[str, ...]]:
    """(split, folders between the base and the image) of an image."""
    start = next((start for start in starts if path.startswith(start)), None)
    if start is not None:
        base, parts = starts[start], tuple(path[len(start) :].split("/")[:-1])
        if base.inner and len(parts) > 1:
            return base.inner[parts[1]], (parts[0], *parts[2:])
        if parts and not base.inner:
            return base.split, parts
    raise TesseraError(
        f"{source}: the image {path} is in no class folder",
        hint="move it into one, or out of the source",
    )


def _named_class(path: str) -> str:
    name = class_in_name(path)
    if not name:
        raise TesseraError(
            f"the name of {path} has no class: it has no words before a number",
            hint="as in cat.12.jpg; rename it, or move it out of the source",
        )
    return name


def _split_in(path: str) -> Split | None:
    return next((split for part in path.split("/")[:-1] if (split := split_of(part))), None)


def _class_name(parts: tuple[str, ...], class_from: str) -> str:
    return {"parent": parts[0], "leaf": parts[-1], "path": "/".join(parts)}[class_from]


def _check_levels(source: str, located: Sequence[tuple[str, ...]]) -> None:
    """Refuses class folders without images of their own but with several folders of images."""
    inner: dict[str, set[str]] = {}
    for parts in located:
        inner.setdefault(parts[0], set()).add(parts[1] if len(parts) > 1 else "")
    deep = next((name for name, names in inner.items() if len(names) > 1 and "" not in names), "")
    if not deep:
        return
    leaves = {parts[-1] for parts in located}
    shown = ", ".join(sorted(inner[deep])[:5])
    raise AmbiguousError(
        f"{source}: the folder {deep} has no images, but the folders {shown}: which one names the "
        "class isn't clear",
        readings=[
            Reading(NAME, {"class_from": "parent"}, f"{len(inner)} classes, as {deep}"),
            Reading(NAME, {"class_from": "leaf"}, f"{len(leaves)} classes, as {min(inner[deep])}"),
            Reading(
                NAME,
                {"class_from": "path"},
                f"{len(set(located))} classes, as {deep}/{min(inner[deep])}",
            ),
        ],
    )


def _check_filled(folder: Path, bases: Sequence[_Base], paths: Sequence[str]) -> None:
    filled = {""}
    for path in paths:
        while path not in filled:
            filled.add(path)
            path = os.path.dirname(path)
    places = [place.relative_to(folder) for base in bases for place in find_folders(base.path)]
    empty = [place for place in places if place.as_posix() not in filled]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        others = sorted({Path(name).suffix for name in find_files(folder / empty[0])})
        has = f", only files named {' '.join(others)[:200]}" if others else ""
        raise TesseraError(
            f"{folder}: the class folder {empty[0]}{more} has no images{has}",
            hint="add images or remove the folder",
        )


def _load(folder: Path, item: Item) -> bytes:
    return read_file(folder / item.origin, item.origin)


def _files(folder: Path, item: Item) -> tuple[Path, ...]:
    return (folder / item.origin,)


def _check_name(name: str) -> str:
    if not name.isprintable():  # also names that are not UTF-8
        raise TesseraError(f"the class folder {name!r} has a name that can't be printed")
    return name
