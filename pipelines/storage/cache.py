"""Copies of remote files on the local disk, each named after the checksum of its content.

In: a checksum, and a function that yields the bytes. Out: a file with exactly these bytes. Must not
know where the bytes come from.

Several processes and threads share a folder: the first that needs a file downloads it, the others
wait. A file is written as NAME.part under a lock that ends with its process, and gets its name when
size and checksum are right. A download that was cut short, damaged or killed never gets a name.

When room is needed, the least recently used files are deleted first; those that a process of this
machine has open, which a shared lock shows, only if no others are left. The bytes of a deleted file
are free when all have closed it.
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
"""Returns the bytes of a file from its beginning, in blocks of any size."""


class Cache:
    """Files in `folder` that occupy at most `limit_bytes` together. The limit is exceeded only if
    the files being written at the same time are larger than that."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes

    def has(self, sha256: str, size_bytes: int) -> bool:
        """Whether a file with this checksum and size is in the cache."""
        try:
            return (self._folder / sha256).stat().st_size == size_bytes
        except OSError:
            return False

    def fetch(self, sha256: str, size_bytes: int, blocks: Blocks, what: str) -> Path:
        """Returns the file with this content, which may be deleted when others are fetched.
        Raises as `open` does."""
        os.close(self.open(sha256, size_bytes, blocks, what))
        return self._folder / sha256

    def fetch_unless_busy(self, sha256: str, size_bytes: int, blocks: Blocks, what: str) -> None:
        """Brings the file into the cache, unless another process or thread is just doing it. Raises
        as `open` does."""
        os.close(self.open(sha256, size_bytes, blocks, what, wait=False))

    def open(
        self, sha256: str, size_bytes: int, blocks: Blocks, what: str, *, wait: bool = True
    ) -> int:
        """Returns a file descriptor of this content, which stays readable when the file is deleted
        from the cache. Calls `blocks` if the content is not in the cache.

        `what` names the file in errors. Raises TesseraError, and keeps nothing, if the bytes don't
        have this size and checksum, if they exceed the limit or the disk, or if `blocks` raises it;
        without `wait`, also if another process is just writing the file.
        """
        if size_bytes > self._limit:
            raise TesseraError(
                f"{what} has {size_bytes:,} bytes, "
                f"the limit of the cache {self._folder} is {self._limit:,}",
                hint="raise the limit of the cache",
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                if (file := self._hit(sha256, size_bytes)) is not None:
                    return file
                with _locked(self._folder / (sha256 + _PART), wait=wait) as part:
                    if part is None:
                        continue
                    if self.has(sha256, size_bytes):
                        os.unlink(self._folder / (sha256 + _PART))
                    else:
                        self._fill(part, sha256, size_bytes, blocks, what)
        except BlockingIOError:
            raise TesseraError(f"{what} is being downloaded by another process") from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise TesseraError(
                f"{what} can't be written to the cache {self._folder}: "
                f"{'the disk is full' if full else error.strerror or error}",
                hint="free some space there, or use another folder or a smaller limit",
            ) from None

    def discard_damaged(self, sha256: str) -> bool:
        """Deletes the file with this checksum if its content has another one. Returns whether it
        was deleted. Reads the whole file."""
        path = self._folder / sha256
        try:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return False
        except FileNotFoundError:
            return True
        except OSError:  # the disk can't read it any more
            pass
        with suppress(FileNotFoundError):
            path.unlink()
        return True

    def _hit(self, sha256: str, size_bytes: int) -> int | None:
        try:
            file = os.open(self._folder / sha256, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size_bytes:  # not written by us: we name only verified bytes
            os.close(file)
            with suppress(FileNotFoundError):
                os.unlink(self._folder / sha256)
            return None
        os.utime(file)
        fcntl.flock(file, fcntl.LOCK_SH)  # until it is closed; shows that the file is in use
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
                    hint="it was changed or damaged after packing: pack the data set again",
                )
            os.utime(part)
            os.fdatasync(part)
            os.replace(name, self._folder / sha256)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _reserve(self, part: int, size_bytes: int, name: str) -> None:
        """Frees room and allocates it under a lock, so that two writers don't count on the same
        room."""
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(part, 0)
            kept = sorted(self._entries(), key=lambda entry: entry[0])
            total = size_bytes + sum(size for _, size, _ in kept)
            for in_use in (False, True):
                for _, size, path in kept:
                    if total <= self._limit:
                        break
                    if path.name != name and _delete(path, in_use=in_use):
                        total -= size
                kept = [entry for entry in kept if entry[2].exists()]
            os.ftruncate(part, size_bytes)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Yields (time of last use in ns, size in bytes, path) of each file."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with suppress(FileNotFoundError):
                    about = entry.stat()
                    yield about.st_mtime_ns, about.st_size, Path(entry.path)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[int | None]:
    """Creates and locks a file. Yields its descriptor, or None if another process renamed or
    removed the file while this one waited for the lock. Without `wait` raises BlockingIOError if
    another process has the lock."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            same = os.path.samestat(os.fstat(file), os.stat(path))
        except FileNotFoundError:
            same = False
        yield file if same else None
    finally:
        os.close(file)


def _delete(path: Path, *, in_use: bool) -> bool:
    """Deletes a file unless its lock shows that it is being written or, without `in_use`, that a
    process has it open. Returns whether it is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if path.name.endswith(_PART) or not in_use:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(file)
