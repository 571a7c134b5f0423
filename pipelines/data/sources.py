"""What an importer reads from a source, before anything is packed.

In: a folder, or the name of a bundled data set. Out: a `Source`, which lists the samples and loads
one at a time. Must not know how splits are cut, shards or cards.

`Importer` is what a format provides: a module in `importers/`, or a module or object from outside.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from models.core.errors import TesseraError, UsageError
from pipelines.data.annotations import Annotation
from pipelines.data.card import Split

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib"),
        *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx"),
        *(".heic", ".heif", ".avif"),
    }
)
"""Suffixes of image files. Their content decides which format they have."""
UNREAD_IMAGE_SUFFIXES = frozenset(
    {
        *(".jxl", ".jxr", ".svg", ".eps", ".ico", ".icns", ".cur"),
        *(".tga", ".pcx", ".dds", ".exr", ".hdr", ".pfm", ".fits", ".psd", ".xcf", ".emf"),
        *(".dcm", ".dicom", ".nii", ".mha", ".mhd", ".nrrd", ".svs", ".ndpi", ".czi", ".lif"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
    }
)
"""Suffixes of images in formats that aren't read."""
TABLES = (".csv", ".tsv")
"""Suffixes of tables, which may have labels."""
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, not yet read.

    key      names the sample in the shards (`images.make_key`)
    origin   names the image for the user, mostly as a path relative to the source
    label    its class index, for classification; None for other tasks
    split    None if the source doesn't assign one
    row      its position in the source, for the importer
    problem  (reason, details) if the listing already shows that it can't be packed
    frame    its frame in an animation, or its page; None for the first, where others aren't read
    """

    key: str
    origin: str
    label: int | None = None
    split: Split | None = None
    row: int = 0
    problem: tuple[str, str] | None = None
    frame: int | None = None


def _no_files(item: Item) -> tuple[Path, ...]:
    return ()


@dataclass(frozen=True)
class Source:
    """What an importer reads. It goes to other processes, so its functions are functions of a
    module, or `functools.partial` of such.

    load          returns the image file of an item as bytes, or raises TesseraError
    annotate      returns the annotation of an item, for tasks other than classification and
                  `images`; raises TesseraError, preferably SampleError. `annotations.check` is
                  called afterwards
    files         the files that an item comes from: a resumed pack checks whether they have changed
    notes         lines for the user
    folder        every file below it is accounted for; None for a source without a folder
    shared_files  the files that belong to the whole set: tables, lists, names of classes
    orphans       (reason, details) of each object that belongs to no image of the source
    """

    name: str
    task: str
    classes: tuple[str, ...]
    items: Sequence[Item]
    load: Callable[[Item], bytes]
    annotate: Callable[[Item], Annotation] | None = None
    files: Callable[[Item], tuple[Path, ...]] = _no_files
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    shared_files: tuple[Path, ...] = ()
    orphans: tuple[tuple[str, str], ...] = ()


class Reading(NamedTuple):
    """One way to read a source: a format with options, what it makes of the source, and patterns of
    files that it leaves out."""

    format: str
    options: Mapping[str, str]
    meaning: str
    allow_unused: tuple[str, ...] = ()


class AmbiguousError(UsageError):
    """Raised for a source that can be read in several ways, of which the user must choose one."""

    def __init__(self, message: str, *, hint: str = "", readings: Sequence[Reading] = ()) -> None:
        super().__init__(message, hint=hint)
        self.readings = tuple(readings)

    def with_commands(self, source: str, to: str) -> UsageError:
        """The same error, whose hint is a command for each reading, quoted for a shell."""
        lines = ["choose one:"]
        for reading in self.readings:
            words = ["tessera", "pack", source, "--to", to, "--format", reading.format]
            for name, value in reading.options.items():
                words += ["--option", f"{name}={value}"]
            for pattern in reading.allow_unused:
                words += ["--allow-unused", pattern]
            lines.append(f"{shlex.join(words)}   # {reading.meaning}")
        return UsageError(self.message, hint="\n         ".join(lines))


class Importer(Protocol):
    """A data set format.

    NAME     the name that `--format` takes
    OPTIONS  the options that it takes: name -> help text; may be empty

    A format may have MORE_PRECISE_THAN, names of formats that could read a part of its files: where
    it recognises a source they are not asked about.
    """

    NAME: str
    OPTIONS: Mapping[str, str]

    def recognises(self, source: str) -> str:
        """Why `source` looks like this format, as shown to the user; empty where it doesn't."""

    def read(self, source: str, options: Mapping[str, str]) -> Source:
        """Lists what is in `source`. Raises TesseraError for a source that can't be read."""


def find_files(folder: Path) -> Iterator[str]:
    """Paths of the regular files below `folder`, relative to it and sorted, without hidden ones.

    Links are followed; each folder is visited once.
    """
    yield from _walk(folder, "", set())


def find_images(folder: Path) -> Iterator[str]:
    """The files of `find_files` with the suffix of an image."""
    return (path for path in find_files(folder) if is_image(path))


def is_unread_image(path: str) -> bool:
    """Whether the name is that of an image in a format that isn't read."""
    return os.path.splitext(path)[1].lower() in UNREAD_IMAGE_SUFFIXES


def is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def find_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, without hidden ones."""
    return [folder / entry.name for entry in _scan(folder) if entry.is_dir()]


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # a link to a parent folder would never end
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in _scan(folder):
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", seen)
        elif entry.is_file():
            yield prefix + entry.name


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith((".", "__MACOSX"))]
            # For a circular link `exists` is False, while `is_dir` raises.
            visible = [e for e in visible if not e.is_symlink() or os.path.exists(e.path)]
    except OSError as error:
        raise TesseraError(f"{folder} can't be read: {error.strerror}") from None
    return sorted(visible, key=lambda entry: entry.name)


def read_file(path: Path, origin: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a file of at most `limit` bytes. A pipe is refused: reading it would block."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TesseraError(f"{origin} is not a regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise TesseraError(f"{origin} can't be read: {error.strerror}") from None
    if len(data) > limit:
        raise TesseraError(f"{origin} is larger than {limit >> 20} MiB")
    return data
