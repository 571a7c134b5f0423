"""Copies of remote files on this machine's disk, each under the checksum of its content.

In: a checksum and a way to get the bytes. Out: a file with exactly these bytes. Must not know where
they come from. Several processes and threads share a folder: one downloads, the others wait for it.

A file is written as NAME.part under a lock that ends with its process, and takes its name when size
and checksum are right: what is cut short, damaged or killed never has a name. Two files of one name
in different folders differ in content, and so here. What was used last is dropped last.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.core.errors import TesseraError

_PART = ".part"
Blocks = Callable[[], Iterable[bytes]]
"""Gives the bytes of a file, from its beginning."""


class Cache:
    """Files in `folder` of at most `limit_bytes` together, not counting what is being written when
    nothing is left to drop."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes

    def has(self, sha256: str, size_bytes: int) -> bool:
        try:
            return (self._folder / sha256).stat().st_size == size_bytes
        except OSError:
            return False

    def fetch(self, sha256: str, size_bytes: int, blocks: Blocks, what: str) -> Path:
        """The file with this content; it may be dropped when others are fetched."""
        os.close(self.open(sha256, size_bytes, blocks, what))
        return self._folder / sha256

    def open(self, sha256: str, size_bytes: int, blocks: Blocks, what: str) -> int:
        """A descriptor of the file with this content, which stays readable when it is dropped.

        Raises TesseraError where the bytes are others than said, they don't fit the limit or the
        disk, or `blocks` raises it; then nothing stays behind. `what` names the file in errors.
        """
        if size_bytes > self._limit:
            raise TesseraError(
                f"{what} has {size_bytes:,} bytes, the cache {self._folder} may have {self._limit:,}",
                hint="allow the cache more",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                if (found := self._hit(sha256, size_bytes)) is not None:
                    return found
                with _claimed(self._folder / (sha256 + _PART)) as part:
                    if part is None:
                        continue
                    if self.has(sha256, size_bytes):
                        os.unlink(self._folder / (sha256 + _PART))
                    else:
                        self._fill(part, sha256, size_bytes, blocks, what)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise TesseraError(
                f"{what} can't be kept in the cache {self._folder}: "
                f"{'the disk is full' if full else error.strerror or error}",
                hint="free some space there, or give the cache another folder or a smaller limit",
            ) from None

    def _hit(self, sha256: str, size_bytes: int) -> int | None:
        try:
            file = os.open(self._folder / sha256, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size_bytes:  # not by us: a name stands for checked bytes
            os.close(file)
            with suppress(FileNotFoundError):
                os.unlink(self._folder / sha256)
            return None
        os.utime(file)
        return file

    def _fill(self, part: int, sha256: str, size_bytes: int, blocks: Blocks, what: str) -> None:
        name = self._folder / (sha256 + _PART)
        try:
            self._reserve(part, size_bytes, name.name)
            digest, written = hashlib.sha256(), 0
            for block in blocks():
                digest.update(block)
                written += os.pwrite(part, block, written) if written < size_bytes else len(block)
                if written > size_bytes:
                    break
            if written != size_bytes:
                raise TesseraError(f"{what} has {written:,} bytes, the card says {size_bytes:,}")
            if digest.hexdigest() != sha256:
                raise TesseraError(
                    f"{what}: checksum differs",
                    hint="it was changed or damaged after it was packed: pack the data set again",
                )
            os.utime(part)
            os.fdatasync(part)
            os.replace(name, self._folder / sha256)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _reserve(self, part: int, size_bytes: int, name: str) -> None:
        """Makes room and takes it, so that two that write at once don't take the same."""
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(part, 0)
            kept = sorted(self._entries(), key=lambda entry: entry[0])
            total = size_bytes + sum(size for _, size, _ in kept)
            for _, size, path in kept:
                if total <= self._limit:
                    break
                if path.name != name and _drop(path):
                    total -= size
            os.ftruncate(part, size_bytes)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(when last used, bytes, path)"""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with suppress(FileNotFoundError):
                    about = entry.stat()
                    yield about.st_mtime_ns, about.st_size, Path(entry.path)


@contextmanager
def _claimed(path: Path) -> Iterator[int | None]:
    """The file, made and locked; None where another finished it while this waited for the lock."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(file), os.stat(path))
        except FileNotFoundError:
            same = False
        yield file if same else None
    finally:
        os.close(file)


def _drop(path: Path) -> bool:
    """Removes an entry; not one that is being written, as its lock tells."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if path.name.endswith(_PART):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(file)
