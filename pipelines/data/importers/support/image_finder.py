"""Finds the images that a table or a list names, however it writes their paths.

In: a folder, the images below it, and the names of one table. Out: for each name a path of an image
below the folder, or why there is none. Must not know the table's format.

A name may have backslashes, another Unicode normalisation, no suffix or one in another case, the
path of another machine before it, or be a URL. All names of a table are read alike: what is cut off
before the names, and the folder they are in, are found once, so no name is matched to an image of
the same name elsewhere.
"""

from __future__ import annotations

import copy
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from pipelines.data.importers.support.reading import OUTSIDE, find_problem, is_plain, split_of

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://[^/]*/?", re.I)
_DRIVE = re.compile(r"[a-z]:/", re.I)
_TRIED = 200
"""Names from which the form of all names of a table is found."""

Found = tuple[str, tuple[str, str] | None]
"""The path of an image and None; or the name as it is written, and (reason, details)."""


class ImageFinder:
    """The images below `folder`, by their names.

    `near` is the folder of the table, relative to `folder`: names are tried there first.
    """

    def __init__(self, folder: Path, images: Iterable[str], near: str = "") -> None:
        self._folder, self._near = folder, near
        self._roots = {os.path.join(root, "") for root in _spellings(folder)}
        self._folders: set[str] = set()
        self._paths: dict[str, str] = {}
        self._stems: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for path in images:
            plain = _normal(path)
            self._folders.add(_folder_of(plain))
            self._paths.setdefault(plain, path)
            self._stems.setdefault(os.path.splitext(plain)[0], []).append(path)
            name = plain.rpartition("/")[2]
            for form in {name, os.path.splitext(name)[0]}:
                self._by_name.setdefault(form, []).append(path)

    def beside(self, near: str) -> ImageFinder:
        """The same images, found from a table in another folder. Nothing is indexed again."""
        other = copy.copy(self)
        other._near = near
        return other

    def find_all(self, names: Sequence[str], table: str = "") -> list[Found]:
        """Where each name is. `table` is the name of the table: train.csv is about train/."""
        plain = [_plain(name) for name in names]
        tried = [n for n in dict.fromkeys(plain) if n and self._inside(n) is None][:_TRIED]
        cut = self._find_cut(tried)
        prefix = self._find_prefix([_cut(name, cut) for name in tried], table)
        found: list[Found] = []
        for name, text in zip(names, plain):
            inside = self._inside(text)
            if inside is not None:
                found.append(self._find(name, inside, ""))
            elif text.startswith("/"):
                path, problem = self._find(name, _cut(text, cut), prefix)
                if problem is None and self._contradicts(text, path):
                    path, problem = name, (OUTSIDE, "")
                outside = (
                    f"no image of {self._folder} is at the absolute path {name!r}, nor at its end"
                )
                found.append((path, problem and (OUTSIDE, outside)))
            else:
                found.append(self._find(name, text, prefix))
        return found

    def count(self, names: Sequence[str], table: str = "") -> int:
        """How many of the names are found."""
        return sum(problem is None for _, problem in self.find_all(names, table))

    def _inside(self, name: str) -> str | None:
        """An absolute path in the source, relative to it."""
        root = next((root for root in self._roots if name.startswith(root)), None)
        return None if root is None else name[len(root) :]

    def _contradicts(self, name: str, path: str) -> bool:
        """Whether an absolute path names a folder of the source that its image is not in: where
        only the last part is left, /data/dog/1.jpg would be found as cat/1.jpg."""
        folder = _folder_of(name)
        return folder in self._folders and folder != _folder_of(_normal(path))

    def _find_cut(self, names: Sequence[str]) -> int:
        """How many folders to cut off absolute paths, which were written elsewhere."""
        absolute = [name for name in names if name.startswith("/")]
        if not absolute:
            return 0
        most = min(name.count("/") for name in absolute)
        found = [sum(self._known(_cut(name, cut)) for name in absolute) for cut in range(most + 1)]
        # The fewest that find most: with more, names of other folders would be found too.
        enough = min(len(absolute) // 2 + 1, max(found))
        return next((cut for cut, count in enumerate(found) if 0 < enough <= count), 0)

    def _find_prefix(self, names: Sequence[str], table: str) -> str | None:
        """The folder that the names are in; None if they are in several."""
        near = f"{self._near}/" if self._near else ""
        if not names or any(self._at(near + name) for name in names):
            return near
        places: Counter[str] = Counter()
        for name in names:
            for path in self._named(name):
                places[path[: len(path) - len(self._tail(path, name))]] += 1
        stem = os.path.splitext(os.path.basename(table))[0]
        about = [p for p in places if p and _is_about(p.rstrip("/").rpartition("/")[2], stem)]
        if len(about) == 1:
            return about[0]
        usual = [place for place, count in places.items() if 2 * count > len(names)]
        return usual[0] if len(usual) == 1 else None

    def _find(self, name: str, text: str, prefix: str | None) -> Found:
        if not text or not is_plain(text) or text.startswith("/"):
            return name, (OUTSIDE, f"{name!r} is outside {self._folder}")
        if prefix is not None:
            found = self._at(prefix + text)
            if len(found) == 1:
                return found[0], None
            if len(found) > 1:
                return name, _several(name, found)
            problem = find_problem(self._folder, prefix + text)  # a hidden file, another suffix
            return (name, problem) if problem else (prefix + text, None)
        found = self._named(text)
        if len(found) == 1:
            return found[0], None
        missing = ("missing image", f"there is no {name!r} in {self._folder}")
        return name, _several(name, found) if found else missing

    def _at(self, path: str) -> list[str]:
        """The images at exactly this path; without a suffix, or with one in another case, those
        with the same stem."""
        if path in self._paths:
            return [self._paths[path]]
        alike = self._stems.get(path, [])
        if alike:
            return alike
        stem, suffix = os.path.splitext(path)
        return [
            found
            for found in self._stems.get(stem, [])
            if os.path.splitext(found)[1].lower() == suffix.lower()
        ]

    def _known(self, name: str) -> bool:
        near = f"{self._near}/" if self._near else ""
        return bool(name) and (bool(self._at(near + name)) or bool(self._named(name)))

    def _named(self, name: str) -> list[str]:
        """The images whose path ends in a name, with or without their suffix."""
        found = self._by_name.get(name.rpartition("/")[2], [])
        return [path for path in found if self._tail(path, name)]

    @staticmethod
    def _tail(path: str, name: str) -> str:
        """The end of a path that is the name; empty if it isn't."""
        plain = _normal(path)
        for text in (plain, os.path.splitext(plain)[0]):
            if text == name or text.endswith(f"/{name}"):
                folders = name.count("/") + 1
                return "/".join(path.split("/")[-folders:])
        return ""


def _plain(name: str) -> str:
    """A name with slashes; an absolute path begins with one, and of a URL only the path is left.
    Empty for an unsafe name."""
    if not name or "\0" in name:
        return ""
    if scheme := _SCHEME.match(name):
        return _normal("/" + re.split(r"[?#]", unquote(name[scheme.end() :]))[0])
    text = _normal(name)
    return f"/{text}" if _DRIVE.match(text) else text.removeprefix("./")


def _folder_of(path: str) -> str:
    """The name of the folder that a file is in, without what is above it."""
    return path.rpartition("/")[0].rpartition("/")[2]


def _several(name: str, found: Sequence[str]) -> tuple[str, str]:
    shown = ", ".join(found[:3])
    return "several images of this name", f"{name!r} could be {shown}"


def _is_about(folder: str, table: str) -> bool:
    split = split_of(table)
    return folder == table or (split is not None and split_of(folder) == split)


def _cut(name: str, folders: int) -> str:
    """A name without its first folders, if it is absolute."""
    if not name.startswith("/"):
        return name
    parts = name.strip("/").split("/")
    return "/".join(parts[folders:]) if folders < len(parts) else ""


def _spellings(folder: Path) -> set[str]:
    return {_normal(os.path.abspath(folder)), _normal(os.path.realpath(folder))}


def _normal(name: str) -> str:
    """A name with slashes and composed characters."""
    text = name.replace("\\", "/") if "\\" in name else name
    return text if text.isascii() else unicodedata.normalize("NFC", text)
