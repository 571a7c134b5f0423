"""Finds the images that an annotation file names.

In: names as tools write them, and the images of the source. Out: paths in the source. Must not know
any format.

A name may have backslashes, a drive, be an absolute path of another machine, an address, begin with
./ or ../, have only the last part or no suffix, and accents in the other Unicode form. All names of
a file are read by one rule: leave out the first N folders and put one folder of the source in
front. So an image that is missing stays missing, and no image of the same name elsewhere, of
another split for example, takes its place. Only where images of a file are spread over several
folders are they found by names that occur once.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pipelines.data.card import Split
from pipelines.data.importers.support.reading import find_problem, split_of

_SAMPLED = 200
_ALIKE = 64
"""Images of the same name that are looked at, for each name."""
_DRIVE = re.compile(r"[A-Za-z]:")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*/?")


class Located(NamedTuple):
    """Where a named image is: its path in the source, or why it can't be used."""

    origin: str
    problem: tuple[str, str] | None


def split_name(name: str) -> tuple[str, ...]:
    """The parts of a file's name as a tool wrote it, without drive, host, `.` and `..`."""
    text = name
    if "?d=" in text and not _ADDRESS.match(text.partition("?d=")[2]):
        text = unquote(text.partition("?d=")[2])  # Label Studio's local files
    elif match := _ADDRESS.match(text):
        text = unquote(text[match.end() :].partition("?")[0].partition("#")[0])
    parts = text.replace("\\", "/").split("/")
    if parts and _DRIVE.fullmatch(parts[0]):
        parts = parts[1:]
    return tuple(_normal(part) for part in parts if part not in ("", ".", ".."))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class ImageNames:
    """The images of a source, by their names."""

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        self._folder = folder
        self._paths: dict[tuple[str, ...], str] = {}
        for path in paths:
            self._paths.setdefault(split_name(path), path)
        self._by_name: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        self._in_folder: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for parts in self._paths:
            self._by_name[parts[-1]].append(parts)
            self._in_folder[parts[-2:]].append(parts)
        self._stems: dict[tuple[str, ...], list[str]] | None = None
        self._places: dict[str, list[tuple[str, ...]]] | None = None

    def locate(
        self, names: Sequence[str], preferred: Sequence[str] = ("",), split: Split | None = None
    ) -> list[Located]:
        """The images of one file's names. `preferred` are folders of the source, each with a slash
        at its end, that are tried first; `split` is the file's, so no folder of another is used."""
        split_names = [split_name(name) for name in names]
        if any("%" in name for name in names) and not self._vote(split_names, split, frozenset()):
            split_names = [split_name(unquote(name)) for name in names]
        drop, prefix = self._choose(split_names, preferred, split)
        found = [self._find((*prefix, *parts[drop:])) for parts in split_names]
        if None in found and (spread := self._find_spread(split_names, split)):
            found = list(spread)
        place = "".join(f"{part}/" for part in prefix)
        takers = Counter(path for path, _ in set(zip(found, split_names)))
        located = []
        for path, name in zip(found, names, strict=True):
            if path is None:
                located.append(self._missing(place, name))
            elif takers[path] > 1:
                why = f"{name!r} and another name would both be {path}"
                located.append(Located(path, ("ambiguous image", why)))
            else:
                located.append(Located(path, None))
        return located

    def _choose(
        self, names: Sequence[tuple[str, ...]], preferred: Sequence[str], split: Split | None
    ) -> tuple[int, tuple[str, ...]]:
        """(folders to leave out, folder to put in front)."""
        places = [split_name(place) for place in preferred]
        votes = self._vote(names, split, frozenset(places))
        fitting = [place for place in places if votes[0, place]]
        if fitting:
            return 0, max(fitting, key=lambda place: votes[0, place])
        if not votes:
            return 0, ()
        order = {place: at for at, place in enumerate(places)}
        return min(votes, key=lambda v: (-votes[v], order.get(v[1], len(places)), v))

    def _vote(
        self,
        names: Sequence[tuple[str, ...]],
        split: Split | None,
        preferred: frozenset[tuple[str, ...]],
    ) -> Counter[tuple[int, tuple[str, ...]]]:
        """How many names each rule finds."""
        votes: Counter[tuple[int, tuple[str, ...]]] = Counter()
        step = max(len(names) // _SAMPLED, 1)
        for parts in names[::step]:
            if not parts:
                continue
            alike = self._alike(parts)
            longest = max((_common_tail(parts, path) for path in alike), default=0)
            for path in alike:
                length = _common_tail(parts, path)
                # frame.jpg of another video is no sign: only those that share most folders are.
                if length < longest:
                    continue
                for tail in range(1, length + 1):
                    place = path[: len(path) - tail]
                    if place in preferred or not _is_of_another_split(place, split):
                        votes[len(parts) - tail, place] += 1
        return votes

    def _alike(self, parts: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Images of this name, and those in a folder of this name first; if there are none, those
        of this stem, by their parts without suffix."""
        name = parts[-1]
        found = self._in_folder.get(parts[-2:], []) if len(parts) > 1 else []
        found = found or self._by_name.get(name, [])
        if not found:
            stem, suffix = os.path.splitext(name)
            stem = stem if _is_suffix(suffix) else name
            places = self._places_of_stem().get(stem, [])
            found = [(*place, name) for place in places]
        return found[:_ALIKE]

    def _find(self, parts: tuple[str, ...]) -> str | None:
        """The image with these parts; without a suffix, or with one in the other case, if there is
        only one."""
        path = self._paths.get(parts)
        if path is not None or not parts:
            return path
        stem, suffix = os.path.splitext(parts[-1])
        alike = self._with_stem().get((*parts[:-1], stem if _is_suffix(suffix) else parts[-1]), [])
        if _is_suffix(suffix):
            alike = [p for p in alike if os.path.splitext(p)[1].lower() == suffix.lower()]
        return alike[0] if len(alike) == 1 else None

    def _with_stem(self) -> Mapping[tuple[str, ...], list[str]]:
        """Paths by their parts without suffix."""
        if self._stems is None:
            self._stems = defaultdict(list)
            for parts, path in self._paths.items():
                stem = os.path.splitext(parts[-1])[0]
                self._stems[(*parts[:-1], stem)].append(path)
        return self._stems

    def _places_of_stem(self) -> Mapping[str, list[tuple[str, ...]]]:
        if self._places is None:
            self._places = defaultdict(list)
            for parts in self._with_stem():
                self._places[parts[-1]].append(parts[:-1])
        return self._places

    def _find_spread(
        self, names: Sequence[tuple[str, ...]], split: Split | None
    ) -> list[str] | None:
        """The images of names that occur once in the source; None if one of them doesn't."""
        found = []
        for parts in names:
            paths = [
                path
                for path in (self._alike(parts) if parts else ())
                if not _is_of_another_split(path[:-1], split)
            ]
            longest = max((_common_tail(parts, path) for path in paths), default=0)
            ends = [path for path in paths if _common_tail(parts, path) == longest]
            path = self._find(ends[0]) if len(ends) == 1 else None
            if path is None:
                return None
            found.append(path)
        return found if len(set(found)) == len(found) else None

    def _missing(self, place: str, name: str) -> Located:
        problem = find_problem(self._folder, place + name)
        return Located(place + name, problem)


def _is_suffix(text: str) -> bool:
    return bool(re.fullmatch(r"\.[A-Za-z0-9]{2,4}", text))


def _common_tail(one: tuple[str, ...], two: tuple[str, ...]) -> int:
    length = 0
    for a, b in zip(reversed(one), reversed(two)):
        if a != b:
            break
        length += 1
    return length


def _is_of_another_split(place: tuple[str, ...], split: Split | None) -> bool:
    return split is not None and any(split_of(part) not in (None, split) for part in place)
