"""What became of every file of a source.

In: a `Source`, whose `folder` is walked, hidden files too. Out: an `Account`, which sorts each file
into images, label files, documents, files that the user allows to be left out, and files that
nothing uses. Must not know formats of labels, nor where the account is written.

A picture, a label file or a special file that no sample uses is an error: the source has more than
is read of it. Other files that nothing uses are counted.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from models.core.errors import TesseraError
from pipelines.data.file_kinds import LABEL_SUFFIXES, PICTURE_SUFFIXES, is_document
from pipelines.data.image_formats import sniff
from pipelines.data.packing.statistics import printable
from pipelines.data.sources import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, Source

FILE = "account.json"
"""Name of the account in a packed data set."""
_SHOWN_GROUPS, _EXAMPLES = 8, 3
_HEAD_BYTES = 64
_SURE_FORMATS = frozenset({"JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "HEIF", "AVIF"})
"""Formats whose first bytes no text and hardly any other file has."""
ANY = "*"
"""In the folder of a group: several folders."""

Kind = Literal["picture", "label file", "special file"]


@dataclass(frozen=True)
class Group:
    """Files of one kind, folder and suffix that nothing uses.

    examples  the first paths, relative to the source
    detail    of a special file: what it is
    """

    kind: Kind
    folder: str
    suffix: str
    count: int
    examples: tuple[str, ...]
    detail: str = ""

    @property
    def pattern(self) -> str:
        """A pattern for `--allow-unused` that fits these files."""
        if self.detail and self.count == 1:
            return _escape(self.examples[0])
        inside = f"{_escape(self.folder)}/" if self.folder else ""
        return f"{inside}*{_escape(self.suffix)}"

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.examples) else ""
        shown = ", ".join(self.examples) + more
        if self.detail:
            return f"{self.detail}: {shown}"
        where = f" in {self.folder}" if self.folder else ""
        return f"{self.count:,} {self.suffix or 'without suffix'}{where} ({shown})"


@dataclass(frozen=True)
class Account:
    """How many files a source has, by what became of them. The parts add up to `files`.

    images     files of samples that are pictures and come first: their images
    labels     all other files of samples, and files of the set as a whole
    documents  texts, code, and files of systems and tools
    allowed    files that the user allows to be left out
    others     suffix -> files that nothing uses and that can't have pictures or labels
    unused     files that nothing uses, and shouldn't be left out without being told to
    """

    folder: str
    files: int
    images: int = 0
    labels: int = 0
    documents: int = 0
    allowed: int = 0
    others: dict[str, int] = field(default_factory=dict)
    unused: tuple[Group, ...] = ()

    def __str__(self) -> str:
        parts = {
            "images": self.images,
            "label files": self.labels,
            "documents": self.documents,
            "left out by --allow-unused": self.allowed,
        }
        listed = [f"{count:,} {name}" for name, count in parts.items() if count]
        if self.others:
            by_suffix = ", ".join(
                f"{printable(s) or 'no suffix'} {n:,}" for s, n in self.others.items()
            )
            listed.append(f"{sum(self.others.values()):,} not used ({by_suffix})")
        return f"files: {self.files:,} = {' + '.join(listed) or 'none'}"

    def to_json(self) -> str:
        parts: dict[str, Any] = {
            "files": self.files,
            "images": self.images,
            "labels": self.labels,
            "documents": self.documents,
            "allowed": self.allowed,
            "others": self.others,
        }
        return json.dumps(parts, indent=2) + "\n"

    def check(self) -> None:
        """Raises TesseraError where files are unused that shouldn't be."""
        if not self.unused:
            return
        kinds: Counter[str] = Counter()
        for group in self.unused:
            kinds[group.kind] += group.count
        counted = " and ".join(
            f"{count:,} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items()
        )
        shown = "; ".join(map(str, self.unused[:_SHOWN_GROUPS]))
        more = len(self.unused) - _SHOWN_GROUPS
        patterns = list(dict.fromkeys(group.pattern for group in self.unused))[:_SHOWN_GROUPS]
        options = " ".join(f"--allow-unused {shlex.quote(pattern)}" for pattern in patterns)
        raise TesseraError(
            f"{self.folder}: no sample uses {counted}: {shown}"
            + (f"; … in {more:,} more folders" if more > 0 else ""),
            hint=f"{_advice(self.unused)}; to leave them out: {options}",
        )


def _advice(unused: Sequence[Group]) -> str:
    """What to do with unused files that belong to the data set."""
    pictures = {group.suffix.lower() for group in unused if group.kind == "picture"}
    advice = []
    if unread := sorted(pictures & UNREAD_IMAGE_SUFFIXES):
        advice.append(f"{' '.join(unread)} is not read: convert such files to PNG or JPEG")
    if pictures - PICTURE_SUFFIXES:
        advice.append("give pictures the suffix of their format, such as .jpg")
    if any(group.kind != "picture" for group in unused) or pictures & IMAGE_SUFFIXES:
        advice.append(
            "if they belong to the data set, the source has another format (--format) or another "
            "layout"
        )
    return "; ".join(advice)


def account_for(source: Source, allow_unused: Sequence[str] = ()) -> Account | None:
    """Sorts all files below the folder of a source; None for a source without a folder."""
    if source.folder is None:
        return None
    images, labels = _used(source)
    return sort_files(source.folder, images, labels, allow_unused)


def describe_without_folder(source: Source, given: str) -> str:
    """A line for a source that has no account: which files are used, and why no others are looked
    for. `given` is what the user named."""
    images, labels = _used(source)
    counts = {"images": len(images), "label files": len(labels)}
    used = " + ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    if os.path.isfile(given):
        why = f"{given} is a file, so nothing beside it is looked at"
    else:
        why = f"{given} isn't a folder, so no other files are looked for"
    return f"files: {used}; {why}" if used else f"files: {why}"


def _used(source: Source) -> tuple[set[str], set[str]]:
    """The images, and the other files, that a source uses."""
    images: set[str] = set()
    labels: set[str] = {os.fspath(path) for path in source.shared_files}
    for item in source.items:
        first, *rest = source.files(item) or (None,)
        if first is not None:
            (images if _suffix(os.fspath(first)) in PICTURE_SUFFIXES else labels).add(
                os.fspath(first)
            )
        labels.update(map(os.fspath, filter(None, rest)))
    return images, labels - images


def sort_files(
    folder: Path, images: Iterable[str], labels: Iterable[str], allow_unused: Sequence[str] = ()
) -> Account:
    """Sorts all files below `folder`; `images` and `labels` are the paths of those that are used.

    A pattern of `allow_unused` fits a path below the folder, or a name; `*` also fits slashes.
    """
    used = _relative(folder, images, "image") | _relative(folder, labels, "label")
    counts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    rest: list[tuple[str, str]] = []
    for path, detail in walk(folder):
        kind = used.get(path) if not detail else None
        if kind is None and is_document(path):
            kind = "document"
        if kind is None:
            rest.append((path, detail))
        else:
            counts[kind] += 1
    found = len(rest) + counts.total()
    if rest and counts["image"] + counts["label"] < len(used):
        rest = _without_other_names(folder, rest, used, counts)
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for path, detail in rest:
        suffix = _suffix(path)
        unused: str = "special file" if detail else _kind(folder / path)
        if any(_fits(path, pattern) for pattern in allow_unused):
            counts["allowed"] += 1
        elif unused:
            key = (unused, os.path.dirname(path), os.path.splitext(path)[1], detail)
            groups.setdefault(key, []).append(path)
        else:
            others[suffix] += 1
    return Account(
        folder=str(folder),
        files=found,
        images=counts["image"],
        labels=counts["label"],
        documents=counts["document"],
        allowed=counts["allowed"],
        others=dict(others.most_common()),
        unused=_groups(groups),
    )


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below `folder`, what it is if it isn't a regular file) of every file, hidden ones too.

    Links are followed, but each folder is visited once: a link to a folder that was visited before
    is a special file, as are pipes, sockets, devices, and links to nothing.
    """
    seen: set[tuple[int, int]] = set()
    pending = [("", os.fspath(folder))]
    while pending:
        prefix, here = pending.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                yield prefix.rstrip("/"), "a folder that is in the source twice, by a link"
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise TesseraError(f"{here} can't be read: {error.strerror}") from None
        inner = []
        for entry in listed:
            try:
                if entry.is_dir():
                    inner.append((f"{prefix}{entry.name}/", entry.path))
                else:
                    yield prefix + entry.name, "" if entry.is_file() else _special(entry)
            except OSError:  # a link in a circle of links
                yield prefix + entry.name, "link to itself"
        pending += reversed(inner)


def _special(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "link to nothing"
    return "pipe, socket or device"


def _relative(folder: Path, paths: Iterable[str], kind: str) -> dict[str, str]:
    """Path below the folder -> kind. Importers join paths to the folder, so most only need to be
    cut; the others are outside or not normal, and found by `_without_other_names`."""
    start = os.path.join(os.fspath(folder), "")
    return {path[len(start) :] if path.startswith(start) else path: kind for path in paths}


def _without_other_names(
    folder: Path, rest: list[tuple[str, str]], used: dict[str, str], counts: Counter[str]
) -> list[tuple[str, str]]:
    """What is left of `rest` without files that are used by another name, such as a link's."""
    real = {os.path.realpath(folder / path): kind for path, kind in used.items()}
    left = []
    for path, detail in rest:
        kind = real.get(os.path.realpath(folder / path)) if not detail else None
        if kind is None:
            left.append((path, detail))
        else:
            counts[kind] += 1
    return left


def _groups(groups: dict[tuple[str, str, str, str], list[str]]) -> tuple[Group, ...]:
    made = [
        Group(kind, folder, suffix, len(paths), tuple(paths[:_EXAMPLES]), detail)  # type: ignore[arg-type]
        for (kind, folder, suffix, detail), paths in groups.items()
    ]
    if len(made) > _SHOWN_GROUPS:
        made = _merge(made)
    order = ("label file", "picture", "special file")
    return tuple(sorted(made, key=lambda group: (order.index(group.kind), -group.count)))


def _merge(groups: list[Group]) -> list[Group]:
    """Groups of one suffix whose folders are equally deep as one group, whose folder has a `*`
    where they differ."""
    alike: dict[tuple[str, str, str, int], list[Group]] = {}
    for group in groups:
        key = (group.kind, group.suffix, group.detail, group.folder.count("/"))
        alike.setdefault(key, []).append(group)
    return [_merge_all(found) if len(found) > 1 else found[0] for found in alike.values()]


def _merge_all(groups: list[Group]) -> Group:
    parts = [group.folder.split("/") for group in groups]
    names = [set(column) for column in zip(*parts)]
    folder = "/".join(next(iter(found)) if len(found) == 1 else ANY for found in names)
    examples = [example for group in groups for example in group.examples[:1]][:_EXAMPLES]
    first = groups[0]
    count = sum(group.count for group in groups)
    return Group(first.kind, folder, first.suffix, count, tuple(examples), first.detail)


def _escape(path: str) -> str:
    """A pattern for a path. What can't be pasted into a terminal becomes `?`."""
    parts = [part if part == ANY else glob.escape(part) for part in path.split("/")]
    return "".join(c if c.isprintable() else "?" for c in "/".join(parts))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _kind(path: Path) -> str:
    """What a file may be that nothing uses; empty if it has neither a picture nor labels. One whose
    suffix says nothing, as x.jpg?width=200 or none, is a picture if it begins as one."""
    suffix = path.suffix.lower()
    if suffix in LABEL_SUFFIXES:
        return "label file"
    if suffix in PICTURE_SUFFIXES:
        return "picture"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return "picture" if sniff(file.read(_HEAD_BYTES)) in _SURE_FORMATS else ""
    except OSError:
        return ""


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(
        PurePosixPath(path).name, pattern
    )
