"""A local file that only grows, and its copy in a storage.

In: a text file that processes of this machine append to, and a folder of the storage. Out: the
file's complete lines in that folder, and back on another machine. Must not know what the lines say.

A stored file can't be appended to. So the copy is a series of parts, each named after the offset of
its first byte. The last one is replaced at each publication until it is large enough:

    local file      parts in the storage
      700,000 B     000000000000 (700,000 B)
    1,300,000 B     000000000000 (1,300,000 B), which is now full
    1,300,500 B     000000000000, 000001300000 (500 B)
    1,400,000 B     000000000000, 000001300000 (100,000 B)
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.core.errors import TesseraError
from pipelines.storage.atomic import write_bytes_atomic, write_json_atomic
from pipelines.storage.base import Storage

PART_BYTES = 1 << 20
"""A part of this size is full. It bounds what is sent again at each publication."""


class AppendedFile:
    """The copy of `file` in the folder `folder` of `storage`. One machine may publish at a time;
    processes of that machine wait for each other."""

    def __init__(self, file: Path, storage: Storage, folder: str) -> None:
        self._file, self._storage, self._folder = file, storage, folder
        self._state_file = file.with_name(f".{file.name}.published")

    def published(self) -> int:
        """The bytes of the file that are in the storage."""
        return self._state()[1]

    def publish(self, prepare: Callable[[bytes], None] | None = None) -> int:
        """Uploads the complete lines that are new; returns the bytes that are then in the storage.

        `prepare` is called with the new lines before they are uploaded. Raises TesseraError if the
        storage can't be written.
        """
        with self._locked():
            start, end = self._state()
            new = self._lines_after(end)
            if not new:
                return end
            if prepare is not None:
                prepare(new)
            with self._file.open("rb") as file:
                file.seek(start)
                tail = file.read(end - start) + new
            self._storage.write(f"{self._folder}/{start:012d}", tail)
            self._write_state(start, end + len(new))
            return end + len(new)

    def restore(self) -> bool:
        """Makes the local file one that begins with what is in the storage. A local file that does,
        and may have more lines, is kept; any other is replaced. Returns whether it was replaced."""
        with self._locked():
            parts = self._storage.names(self._folder)
            content, start = b"", 0
            for part in parts:
                start = int(part.rpartition("/")[2])
                if start != len(content):
                    raise TesseraError(
                        f"{self._folder} of {self._storage.where} is damaged: part {start:012d} "
                        f"doesn't follow the {len(content):,} bytes before it"
                    )
                content += self._storage.read(part)
            self._write_state(start, len(content))
            local = self._file.read_bytes() if self._file.exists() else b""
            if local.startswith(content):
                return False
            write_bytes_atomic(self._file, content)
            return True

    def _lines_after(self, end: int) -> bytes:
        if not self._file.exists():
            return b""
        with self._file.open("rb") as file:
            file.seek(end)
            new = file.read()
        return new[: new.rfind(b"\n") + 1]

    def _state(self) -> tuple[int, int]:
        """Where the part begins that is replaced next, and the bytes that are published."""
        try:
            start, end = json.loads(self._state_file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0, 0
        return int(start), int(end)

    def _write_state(self, start: int, end: int) -> None:
        is_full = end - start >= PART_BYTES
        write_json_atomic(self._state_file, [end if is_full else start, end])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.with_name(f".{self._file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
