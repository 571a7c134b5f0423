"""What YOLO's files say of a whole set: the text of each image, names of classes, splits.

In: the folder of a set. Out: pairs, names, and the split of each image. Must not know what is in
the label files.

Splits are the folders or lists of images in data.yaml (Ultralytics), those in a .data file
(Darknet, CVAT), lists called train.txt, val.txt and test.txt, or else folders with a split's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from models.core.errors import TesseraError
from pipelines.data.card import SPLITS, Split
from pipelines.data.importers.support.image_names import ImageNames
from pipelines.data.importers.support.pairs import pair, split_in_folders, split_path
from pipelines.data.importers.support.reading import split_of
from pipelines.data.safe_parsers import read_yaml
from pipelines.data.sources import is_image, read_file

MAX_TEXT_BYTES = 16 << 20
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "classes.names")
_LIST_NAMES = {"valid": "val"}


class Settings(NamedTuple):
    """The set's settings: content of data.yaml or of a .data file, the file's name, and its path;
    all empty if there is none."""

    content: Mapping[str, object]
    where: str = ""
    path: Path | None = None


def pair_texts(files: Sequence[str]) -> dict[str, str]:
    """Image -> its text file: x.txt, or else x.jpg.txt. As in YOLO, x.jpg and x.png share x.txt."""
    images = [path for path in files if is_image(path)]
    texts = [path for path in files if path.lower().endswith(".txt")]
    found = {image: text for text, image in pair(texts, images).items()}
    used = set(found.values())
    whole = {  # x.jpg.txt -> the name that x.txt would have
        os.path.splitext(path[:-4])[0] + path[-4:]: path
        for path in texts
        if path not in used and is_image(path[:-4])
    }
    if whole:
        left = [image for image in images if image not in found]
        found.update({image: whole[text] for text, image in pair(whole, left).items()})
    by_stem = {split_path(image): text for image, text in found.items() if not is_image(text[:-4])}
    for image in images:
        if image not in found and split_path(image) in by_stem:
            found[image] = by_stem[split_path(image)]
    return found


def read_settings(folders: Sequence[Path]) -> Settings:
    """data.yaml, or the only other .yaml, with names, or a .data file, in the first folder that has
    one."""
    for folder in folders:
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
        found = _read_yamls(files) or _read_data_file(files)
        if found:
            return found
    return Settings({})


def _read_yamls(files: Sequence[Path]) -> Settings | None:
    yamls = [path for path in files if path.suffix.lower() in (".yaml", ".yml")]
    read = []
    for path in [path for path in yamls if path.stem == "data"] or yamls:
        content = read_yaml(read_file(path, path.name), path.name)
        read.append(Settings(content if isinstance(content, dict) else {}, path.name, path))
    if len(read) > 1:
        read = [settings for settings in read if "names" in settings.content]
    if any(settings.content["names"] != read[0].content["names"] for settings in read[1:]):
        raise TesseraError(
            f"{' and '.join(s.where for s in read)} have different names of classes",
            hint="leave one of them in the folder, or call it data.yaml",
        )
    return read[0] if read else None


def _read_data_file(files: Sequence[Path]) -> Settings | None:
    for path in (path for path in files if path.suffix.lower() == ".data"):
        text = read_file(path, path.name, MAX_TEXT_BYTES).decode("utf-8-sig", "replace")
        pairs = [line.partition("=") for line in text.splitlines() if "=" in line]
        content = {name.strip(): value.strip() for name, _, value in pairs}
        content = {_LIST_NAMES.get(name, name): value for name, value in content.items()}
        return Settings(content, path.name, path)
    return None


def read_names(
    root: Path, options: Mapping[str, str], settings: Settings, files: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the classes, and the files that they are from."""
    found: list[object] = []
    content, where, _ = settings
    named = content.get("names")
    paths = [p for p in files if p.rpartition("/")[2] in _NAME_FILES or p.endswith(".names")]
    if "classes" in options:
        found, where = list(options["classes"].split(",")), "the option classes"
    elif isinstance(named, dict):
        found = _in_order(named, where)
    elif isinstance(named, list):
        found = named
    elif where and not where.endswith(".data"):
        raise TesseraError(f"{where} has no list of names", hint="names: [cat, dog]")
    elif not paths:
        raise TesseraError(
            f"{root} has no names of classes",
            hint="add data.yaml with names, or classes.txt, or give --option classes=NAME,NAME",
        )
    else:
        where, found = paths[0], list(_read_lines(root, paths[0]))
    if not found:
        raise TesseraError(f"{where} has no list of names", hint="names: [cat, dog]")
    classes = tuple(name.strip() if isinstance(name, str) else "" for name in found)
    if not all(name and name.isprintable() for name in classes):
        raise TesseraError(f"{where} has a class whose name is empty or can't be printed")
    if len(set(classes)) != len(classes):
        raise TesseraError(f"{where} has two classes with the same name")
    for path in paths if "classes" not in options else ():
        if tuple(_read_lines(root, path)) != classes:
            raise TesseraError(
                f"{where} and {path} have different names of classes",
                hint="give the right ones: --option classes=NAME,NAME",
            )
    count = str(content.get("nc") or content.get("classes") or len(classes))
    if "classes" not in options and count.isdigit() and int(count) != len(classes):
        raise TesseraError(
            f"{settings.where} says that there are {count} classes, and {where} names "
            f"{len(classes)}",
            hint="give the right ones: --option classes=NAME,NAME",
        )
    return classes, tuple(paths)


def _in_order(names: Mapping[str, object], where: str) -> list[object]:
    """Names by their numbers, which must be 0, 1, 2, …"""
    if set(names) != {str(number) for number in range(len(names))}:
        raise TesseraError(f"{where}: the numbers of its names are not 0, 1, 2, …")
    return [names[str(number)] for number in range(len(names))]


def _read_lines(root: Path, path: str) -> list[str]:
    text = read_file(root / path, path, MAX_TEXT_BYTES).decode("utf-8-sig", "replace")
    return [line.strip() for line in text.split("\n") if line.strip()]


class Splits:
    """The split of each image of a set.

    lists    files that list images
    notes    lines for the user
    """

    def __init__(self, root: Path, settings: Settings, files: Sequence[str]) -> None:
        self.lists: list[str] = []
        self.notes: list[str] = []
        self._root, self._files = root, frozenset(files)
        self._names: ImageNames | None = None
        self._images = [path for path in files if is_image(path)]
        self._folders: dict[str, Split] = {}
        self._listed: dict[str, Split] = {}
        self._where = settings.where
        for split, text in self._sources(settings):
            self._add(split, text)

    def of(self, image: str) -> Split | None:
        """By a list, by the innermost folder that the settings name, or by a folder's name."""
        if self._listed:
            return self._listed.get(image)
        fitting = [f for f in self._folders if image.startswith(f"{f}/") or not f]
        return self._folders[max(fitting, key=len)] if fitting else split_in_folders(image)

    def has(self, image: str) -> bool:
        """Whether an image is in the set: in a list, if there are lists."""
        return not self._listed or image in self._listed

    def _sources(self, settings: Settings) -> Iterable[tuple[Split, str]]:
        given: list[tuple[Split, str]] = []
        for split in SPLITS:
            value = settings.content.get(split)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and text.strip():
                    given.append((split, text.strip()))
        if given:
            return given
        lists = [(split_of(p[:-4]), p) for p in sorted(self._files) if _is_list(self._root, p)]
        return [(split, path) for split, path in lists if split]

    def _add(self, split: Split, text: str) -> None:
        parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        # From the whole path to its last part: it may begin with a folder of its author's.
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        path = next((tail for tail in tails if tail in self._files), None)
        if path is not None and path.lower().endswith(".txt"):
            self._add_list(split, path)
            return
        found = next((tail for tail in tails if (self._root / tail).is_dir()), None)
        if found is None and not parts:
            found = ""
        if found is None:
            self.notes.append(f"{self._where} has {split}: {text}, which is not a folder here")
        elif (other := self._folders.setdefault(found, split)) != split:
            self._note_same(other, split, found)

    def _add_list(self, split: Split, path: str) -> None:
        self.lists.append(path)
        names = _read_lines(self._root, path)
        if self._names is None:
            self._names = ImageNames(self._root, self._images)
        located = self._names.locate(names)
        missing = [name for name, (_, problem) in zip(names, located) if problem]
        if missing:
            self.notes.append(
                f"{path} lists {len(missing)} images that are not here, for example {missing[0]}"
            )
        images = [origin for origin, problem in located if not problem]
        others = {self._listed[image] for image in images if image in self._listed} - {split}
        twice = [image for image in images if self._listed.get(image, split) != split]
        if not twice:
            self._listed.update(dict.fromkeys(images, split))
        elif len(twice) == len(images) and len(others) == 1:
            self._note_same(others.pop(), split, path)
        else:
            raise TesseraError(
                f"{twice[0]} is listed as {self._listed[twice[0]]} and, in {path}, as {split}",
                hint="an image may only be in one split: take it out of one of the lists",
            )

    def _note_same(self, first: Split, second: Split, where: str) -> None:
        self.notes.append(
            f"{self._where or 'the set'} has the same images for {first} and {second} ({where}): "
            f"they are {first}, and a part of train becomes {second}"
        )


def _is_list(root: Path, path: str) -> bool:
    """Whether a file at the top is called after a split and lists images."""
    if "/" in path or not path.lower().endswith(".txt") or not split_of(path[:-4]):
        return False
    try:
        with (root / path).open("rb") as file:
            head = file.read(4096).decode("utf-8-sig", "replace")
    except OSError:
        return False
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    return bool(lines) and is_image(lines[0])
