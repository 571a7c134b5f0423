"""What to predict: image files, folders, globs, tars, lists, web addresses and standard input.

In: what the user names. Out: an `ImageInput` for each image, whose bytes are read when they are
needed; and a `LeftOut`, which counts the files that no prediction is made of. Must not know what a
network is.
"""

from __future__ import annotations

import glob
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from models.core.errors import TesseraError, UsageError
from pipelines.data import image_reading
from pipelines.data.image_formats import sniff
from pipelines.data.packing.account import walk
from pipelines.data.packing.in_place_tars import entries
from pipelines.data.sources import is_image, is_unread_image
from pipelines.storage.download import download, is_web_address

MAX_FILE_BYTES = 512 * 2**20
STDIN = "-"
_HEAD_BYTES = 512
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class ImageInput:
    """An image to predict.

    name    of the image, for the user: a path, an address, `-`, or TAR/MEMBER
    load    returns its bytes, or raises TesseraError
    keep    whether the bytes can be loaded once only, or at a cost
    """

    name: str
    load: Callable[[], bytes]
    keep: bool = False

    @property
    def file_name(self) -> str:
        """The last part of the name, without the query of an address."""
        path = urlsplit(self.name).path if is_web_address(self.name) else self.name
        return os.path.basename(path) or "image"


@dataclass
class LeftOut:
    """The files of folders and tars that nothing is predicted of, counted by suffix or kind."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, detail: str = "") -> None:
        self.counts[detail or os.path.splitext(path)[1].lower() or "without suffix"] += 1

    def __str__(self) -> str:
        listed = ", ".join(f"{count:,} {what}" for what, count in self.counts.most_common())
        return f"left out: {listed}" if listed else ""


def of_file(path: str | Path) -> ImageInput:
    return ImageInput(str(path), partial(read_file, Path(path)))


def expand(
    inputs: Iterable[str | Path], *, hosts: Iterable[str] = (), left_out: LeftOut | None = None
) -> Iterator[ImageInput]:
    """Yields files as they are, the images below a folder, those in a tar, and the files that match
    a glob, sorted. `-` is an image on standard input, or a list of inputs, one a line.

    In a folder, files without a suffix count as images if they begin like one, and pictures of a
    format that isn't read are yielded, to result in an error line each. An input without files is
    yielded as it is, and results in an error line, too. Other files are counted in `left_out`.
    Addresses are read from `hosts` only.
    """
    left_out = LeftOut() if left_out is None else left_out
    allowed = tuple(hosts)
    for given in inputs:
        text = os.fspath(given)
        if text == STDIN:
            yield from _standard_input(allowed, left_out)
        else:
            yield from _expand_one(text, allowed, left_out)


def read_list(path: Path) -> Iterator[str]:
    """The lines of a file that lists inputs. Raises UsageError if it can't be read."""
    try:
        with path.open("rb") as file:
            yield from _lines(file, str(path))
    except OSError as error:
        raise UsageError(f"the list {path} can't be read: {error.strerror}") from None


def read_file(path: Path) -> bytes:
    """Reads a regular file. Raises TesseraError for anything else, and never blocks."""
    try:
        if path.is_dir():
            raise TesseraError(f"{path} is a folder without images, or can't be listed")
        if not path.exists():
            raise TesseraError(f"{path} doesn't exist")
        if not path.is_file():
            raise TesseraError(f"{path} is not a regular file")
        _check_bytes(path.stat().st_size, str(path))
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TesseraError(f"{path} can't be read: {reason}") from None


def _expand_one(text: str, hosts: tuple[str, ...], left_out: LeftOut) -> Iterator[ImageInput]:
    if is_web_address(text):
        yield ImageInput(text, partial(_download, text, hosts), keep=True)
        return
    path = Path(text)
    if _is(path, os.path.isdir):
        yield from _of_folder(path, left_out)
    elif path.suffix.lower() == ".tar" and _is(path, os.path.isfile):
        yield from _of_tar(path, left_out)
    elif _is(path, os.path.exists) or not glob.has_magic(text):
        yield of_file(path)
    else:
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        files = [match for match in matches if not match.is_dir()]
        for match in files or [path]:
            yield from _of_tar(match, left_out) if match.suffix == ".tar" else [of_file(match)]


def _is(path: Path, test: Callable[[str], bool]) -> bool:
    try:
        return test(str(path))
    except ValueError:  # a NUL in the name
        return False


def _of_folder(folder: Path, left_out: LeftOut) -> Iterator[ImageInput]:
    found = False
    try:
        files = sorted(walk(folder))
    except (OSError, TesseraError):  # a folder that can't be listed
        files = []
    for name, detail in files:
        if detail or any(part.startswith(".") for part in name.split("/")):
            left_out.add(name, detail or "hidden")
        elif is_image(name) or is_unread_image(name) or _begins_like_image(folder / name):
            found = True
            yield of_file(folder / name)
        elif name.lower().endswith(".tar"):
            found = True
            yield from _of_tar(folder / name, left_out)
        else:
            left_out.add(name)
    if not found:
        yield of_file(folder)


def _begins_like_image(path: Path) -> bool:
    """Whether a file without a suffix is an image."""
    if path.suffix:
        return False
    try:
        with path.open("rb") as file:
            return sniff(file.read(_HEAD_BYTES)) is not None
    except OSError:
        return False


def _of_tar(path: Path, left_out: LeftOut) -> Iterator[ImageInput]:
    """The images in a tar, WebDataset shards for example; the tar itself if it has none."""
    found = False
    try:
        with path.open("rb") as file:
            for entry in entries(file.fileno(), str(path)):
                if is_image(entry.name) and not os.path.basename(entry.name).startswith("._"):
                    found = True
                    name = f"{path}/{entry.name}"
                    yield ImageInput(name, partial(_member, path, name, entry.start, entry.size))
                else:
                    left_out.add(entry.name)
    except (OSError, TesseraError) as error:
        yield ImageInput(str(path), partial(_fail, f"{path} can't be read as a tar: {error}"))
        return
    if not found:
        yield ImageInput(str(path), partial(_fail, f"{path} has no images"))


def _member(path: Path, name: str, start: int, size: int) -> bytes:
    _check_bytes(size, name)
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), size, start)
    except OSError as error:
        raise TesseraError(f"{name} can't be read: {error.strerror}") from None


def _download(address: str, hosts: tuple[str, ...]) -> bytes:
    return download(address, hosts, _most_bytes())


def _most_bytes() -> int:
    """The most bytes of a file: more if larger images are allowed."""
    pixels = image_reading.current().max_pixels
    return MAX_FILE_BYTES * max(1, -(-pixels // image_reading.MAX_PIXELS))


def _check_bytes(size: int, where: str) -> None:
    if size > _most_bytes():
        raise TesseraError(
            f"{where} is larger than {_most_bytes():,} bytes",
            hint="reduce its size, or allow larger images: --option max_pixels="
            f"{image_reading.MAX_PIXELS * -(-size // MAX_FILE_BYTES)}",
        )


def _fail(message: str) -> bytes:
    raise TesseraError(message)


def _standard_input(hosts: tuple[str, ...], left_out: LeftOut) -> Iterator[ImageInput]:
    stream = sys.stdin.buffer
    head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]  # type: ignore[union-attr]
    if sniff(head) is not None:
        data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            message = f"{STDIN} has more than {MAX_FILE_BYTES:,} bytes"
            yield ImageInput(STDIN, partial(_fail, message))
        else:
            yield ImageInput(STDIN, partial(bytes, data), keep=True)
        return
    for line in _lines(stream, "standard input"):
        if line != STDIN:
            yield from _expand_one(line, hosts, left_out)


def _lines(stream: IO[bytes], where: str) -> Iterator[str]:
    """The lines that are not empty."""
    for number in itertools.count(1):
        line = stream.readline(_MAX_LINE_BYTES)
        if not line:
            return
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise UsageError(
                f"{where}, line {number}, is longer than {_MAX_LINE_BYTES:,} bytes",
                hint="give one path or address a line, or one image",
            )
        text = os.fsdecode(line.rstrip(b"\r\n"))
        if text.strip():
            yield text
