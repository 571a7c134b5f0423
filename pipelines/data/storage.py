"""Where files lie: in a folder, or at an address of an object store.

In: a path or a URL. Out: a `Place` to read and write files in, whole or not at all. Must not know
what the files are.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Protocol

from models.core.errors import TesseraError


class Place(Protocol):
    """A folder or an address. Paths are relative to it, with `/`; one that leads out of it is a
    TesseraError, as is everything that can't be read or written."""

    where: str
    """As the user knows it: the folder, or the URL without its last slash."""

    def read(self, path: str) -> bytes:
        """A small file, whole."""

    def size(self, path: str) -> int | None:
        """In bytes; None where there is no such file."""

    def fetch(self, path: str, *, size_bytes: int, sha256: str) -> Path:
        """A local file with this content: the file itself, or a checked copy in the cache."""

    def put(self, file: Path, path: str) -> None:
        """Takes over a local file; it appears whole or not at all, and `file` is gone after."""

    def write(self, path: str, data: bytes) -> None:
        """Writes a small file; it appears whole or not at all, and is on the disk after."""

    def remove(self, path: str) -> None:
        """Removes a file, if it is there."""

    def names(self, folder: str = "") -> list[str]:
        """Paths of all files below `folder`, sorted; none where there is no such folder."""


def at(where: str | Path) -> Place:
    """The place: a folder, which need not exist yet, or a URL."""
    return Folder(Path(where))


class Folder:
    """A `Place` that is a local folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = str(folder)

    def read(self, path: str) -> bytes:
        try:
            return self._locate(path).read_bytes()
        except OSError as error:
            raise TesseraError(f"{path} of {self.where} can't be read: {error.strerror}") from None

    def size(self, path: str) -> int | None:
        try:
            return self._locate(path).stat().st_size
        except OSError:
            return None

    def fetch(self, path: str, *, size_bytes: int, sha256: str) -> Path:
        return self._locate(path)

    def put(self, file: Path, path: str) -> None:
        target = self._locate(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)

    def write(self, path: str, data: bytes) -> None:
        target = self._locate(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)

    def remove(self, path: str) -> None:
        self._locate(path).unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        root = self._locate(folder) if folder else self._folder
        found = (Path(at, name) for at, _, names in os.walk(root) for name in names)
        return sorted(path.relative_to(self._folder).as_posix() for path in found)

    def _locate(self, path: str) -> Path:
        return self._folder.joinpath(*check_path(path, self.where))


def check_path(path: str, where: str) -> tuple[str, ...]:
    """The parts of a relative path; refused where it would lead elsewhere."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or ":" in path or "\0" in path:
        raise TesseraError(
            f"the card of {where} names the file {path!r}, which is not allowed",
            mend="files of a data set lie in its folder",
        )
    return parts
