"""Storage in a local folder.

In: a folder. Out: a `Storage`. Must not know what the files are.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.storage.atomic import copy_atomic, move_atomic, write_bytes_atomic
from pipelines.storage.base import MAX_READ_BYTES, FileInfo, check_path


class FolderStorage:
    """A `Storage` that is a local folder, which need not exist yet."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = str(folder)

    def read(self, path: str) -> bytes:
        try:
            with self._locate(path).open("rb") as file:
                data = file.read(MAX_READ_BYTES + 1)
        except OSError as error:
            raise self._unreadable(path, error) from None
        if len(data) > MAX_READ_BYTES:
            raise TesseraError(f"{path} of {self.where} is larger than {MAX_READ_BYTES:,} bytes")
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            with self._locate(path).open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise self._unreadable(path, error) from None
        if len(data) != stop - start:
            raise TesseraError(f"{path} of {self.where} ends before byte {stop:,}")
        return data

    def size(self, path: str) -> int | None:
        try:
            status = self._locate(path).stat()
        except OSError:
            return None
        # Reading a pipe would block, and reading a device would not end.
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        pairs = ((path, self.size(path)) for path in paths)
        return {path: size for path, size in pairs if size is not None}

    def fetch(self, path: str, *, size_bytes: int, sha256: str) -> Path:
        return self._locate(path)

    def open(self, path: str, *, size_bytes: int, sha256: str) -> int:
        try:
            return os.open(self._locate(path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(path, error) from None

    def discard_damaged(self, path: str, *, sha256: str) -> bool:
        return False

    def prefetch(self, files: Sequence[FileInfo]) -> None:
        return

    def download(self, path: str, to: Path) -> None:
        try:
            shutil.copyfile(self._locate(path), to)
        except OSError as error:
            raise self._unreadable(path, error) from None

    def put(self, file: Path, path: str) -> None:
        move_atomic(file, self._locate(path))

    def upload(self, file: Path, path: str) -> None:
        copy_atomic(file, self._locate(path))

    def write(self, path: str, data: bytes) -> None:
        write_bytes_atomic(self._locate(path), data, durable=True)

    def create_if_absent(self, path: str, data: bytes) -> bool:
        file = self._locate(path)
        part = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.link(part, file)  # unlike a rename, it fails if there is a file
        except FileExistsError:
            return False
        except OSError as error:
            raise TesseraError(
                f"{path} of {self.where} can't be written: {error.strerror or error}"
            ) from None
        finally:
            part.unlink(missing_ok=True)
        return True

    def times(self, folder: str) -> dict[str, float]:
        times = {}
        for name in self.names(folder):
            with suppress(FileNotFoundError):
                times[name] = self._locate(name).stat().st_mtime
        return times

    def remove(self, path: str) -> None:
        self._locate(path).unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        root = self._locate(folder) if folder else self._folder
        paths = (Path(parent, name) for parent, _, names in os.walk(root) for name in names)
        return sorted(path.relative_to(self._folder).as_posix() for path in paths)

    def folders(self, folder: str = "") -> list[str]:
        root = self._locate(folder) if folder else self._folder
        try:
            return sorted(path.name for path in root.iterdir() if path.is_dir())
        except FileNotFoundError:
            return []

    def _locate(self, path: str) -> Path:
        return self._folder.joinpath(*check_path(path, self.where))

    def _unreadable(self, path: str, error: OSError) -> TesseraError:
        return TesseraError(f"{path} of {self.where} can't be read: {error.strerror}")
