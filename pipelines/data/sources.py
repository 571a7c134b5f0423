"""What an importer reads from a source, before anything is packed.

In: a folder, or the name of a bundled data set. Out: a `Source`, which lists the samples and loads
one at a time. Must not know how splits are cut, shards or cards.

`Importer` is what a format provides: a module in `importers/`, or a module or object from outside.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.core.errors import TesseraError
from pipelines.data.annotations import Annotation
from pipelines.data.card import Split

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Files of these names are taken for images; what they are is told by their content."""
TABLES = (".csv", ".tsv")
"""Files of these names are taken for tables, which may have labels."""
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, not yet read.

    key      names the sample in the shards (`samples.make_key`)
    origin   where a person finds it, mostly a path relative to the source
    label    its class, for classification; None for other tasks
    split    None where the source knows none
    row      where the importer finds it
    problem  (reason, details) where the listing shows already that it can't be packed
    """

    key: str
    origin: str
    label: int | None = None
    split: Split | None = None
    row: int = 0
    problem: tuple[str, str] | None = None


def _no_files(item: Item) -> tuple[Path, ...]:
    return ()


@dataclass(frozen=True)
class Source:
    """What an importer found. It goes to other processes, so its functions are functions of a
    module, or `functools.partial` of such.

    load      gives an item's image file as bytes, or raises TesseraError
    annotate  gives what is said of the image, for tasks other than classification and `images`;
              raises TesseraError, best a `SampleError`. It need not check what `annotations.check` does
    files     the files that an item is made of: a pack that goes on looks whether they are the same
    notes     lines for the user
    """

    name: str
    task: str
    classes: tuple[str, ...]
    items: Sequence[Item]
    load: Callable[[Item], bytes]
    annotate: Callable[[Item], Annotation] | None = None
    files: Callable[[Item], tuple[Path, ...]] = _no_files
    notes: tuple[str, ...] = ()


class Importer(Protocol):
    """A data set format.

    NAME     the name that `--format` takes
    OPTIONS  the options that it takes: name -> help text; may be empty
    """

    NAME: str
    OPTIONS: Mapping[str, str]

    def recognises(self, source: str) -> str:
        """Why `source` looks like this format, as shown to the user; empty where it doesn't."""

    def read(self, source: str, options: Mapping[str, str]) -> Source:
        """Lists what is in `source`. Raises TesseraError for a source that can't be read."""


def find_files(folder: Path) -> Iterator[str]:
    """Paths, relative to `folder` and sorted, of the regular files below it, without hidden ones.

    Links are followed, each folder once.
    """
    yield from _walk(folder, "", set())


def find_images(folder: Path) -> Iterator[str]:
    """Those of `find_files` that are named like images."""
    return (path for path in find_files(folder) if is_image(path))


def is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def find_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, without hidden ones."""
    return [folder / entry.name for entry in _scan(folder) if entry.is_dir()]


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    place = folder.stat()
    if (place.st_dev, place.st_ino) in seen:  # a link to a folder above would never end
        return
    seen.add((place.st_dev, place.st_ino))
    for entry in _scan(folder):
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", seen)
        elif entry.is_file():
            yield prefix + entry.name


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith((".", "__MACOSX"))]
            # A link in a circle is no error of `exists`, but one of `is_dir`.
            visible = [e for e in visible if not e.is_symlink() or os.path.exists(e.path)]
    except OSError as error:
        raise TesseraError(f"{folder} can't be read: {error.strerror}") from None
    return sorted(visible, key=lambda entry: entry.name)


def read_file(path: Path, origin: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """A source's file, of at most `limit` bytes; not a pipe, which would be waited for."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TesseraError(f"{origin} is no regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise TesseraError(f"{origin} can't be read: {error.strerror}") from None
    if len(data) > limit:
        raise TesseraError(f"{origin} is larger than {limit >> 20} MiB")
    return data
