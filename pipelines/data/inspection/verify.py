"""Checks every byte of a packed data set against its card and its index.

In: a folder or an address. Out: a line for each difference. Must not know annotations: the
checksums show that they didn't change since they were packed.

Each shard is read once. This checks its checksum and, for each sample, the checksum, the members
and, for classification, that the class in the tar is the one in the index. A remote shard is
downloaded again, not taken from the cache.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from models.core.errors import TesseraError
from pipelines.data import card as cards
from pipelines.data.card import ANNOTATION_EXTENSIONS, Card, Shard, Split, SplitCard
from pipelines.data.index import Index, Rows
from pipelines.data.tar import BLOCK, padded
from pipelines.storage.base import CacheSettings, Storage
from pipelines.storage.open import open_shards, open_storage

Progress = Callable[[int, int], None]
"""Called with the number of bytes checked so far, and the total."""


class Row(NamedTuple):
    """A row of the index as plain values."""

    offset: int
    size: int
    image: int
    image_size: int
    note: int
    note_size: int
    crc32: int
    label: int
    key: bytes


@dataclass(frozen=True)
class Report:
    """How much was checked, and a line for each difference."""

    shards: int
    samples: int
    size_bytes: int
    differences: tuple[str, ...]


def verify(where: str | Path, *, workers: int = 0, progress: Progress | None = None) -> Report:
    """Checks a data set with `workers` threads, by default one per CPU. Raises TesseraError if
    there is no card, or if the card's digest does not match its content."""
    card = cards.read(where)
    counted = [shard for split in card.splits.values() for shard in split.shards]
    total = sum(shard.size_bytes for shard in counted)
    differences: list[str] = []
    done = 0
    workers = workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="tessera-verify-") as folder:
        fresh = CacheSettings(Path(folder), 1 << 50)
        storage = open_storage(where, fresh)
        shards = open_shards(where, card.root, fresh)
        with ThreadPoolExecutor(workers, thread_name_prefix="tessera-verify") as pool:
            tables = [_Table(storage, card, name) for name in card.splits]
            work = partial(_check_shard, shards, card, Path(folder))
            waiting = {
                pool.submit(work, shard, table, number): shard
                for table in tables
                for number, shard in enumerate(table.split.shards)
            }
            try:
                for future in as_completed(waiting):
                    differences += future.result()
                    done += waiting[future].size_bytes
                    if progress:
                        progress(done, total)
            finally:
                pool.shutdown(cancel_futures=True)
            for table in tables:
                differences += table.close()
    samples = sum(split.samples for split in card.splits.values())
    return Report(len(counted), samples, total, tuple(sorted(differences)))


class _Table:
    """The index of a split, shared by threads, and its differences."""

    def __init__(self, storage: Storage, card: Card, name: Split) -> None:
        self.split = card.splits[name]
        self._name, self._classes = name, card.classes
        self._lock = threading.Lock()
        self._counts = np.zeros(len(card.classes), np.int64)
        self._index: Index | None = None
        self._differences: list[str] = []
        self._countable = card.task == "classification"
        """Whether the classes of all samples can still be counted."""
        try:
            if problem := _index_problem(storage, self.split):
                self._differences.append(f"index {self.split.index}: {problem}")
            self._index = Index(storage, self.split)
        except TesseraError as error:
            self._differences = [f"index {self.split.index}: {error.message}"]
            self._countable = False

    def rows(self, number: int) -> Rows | None:
        """The rows of a shard; None if they are damaged."""
        if self._index is None:
            return None
        with self._lock:
            try:
                rows = self._index.rows(number)
            except TesseraError as error:
                self._differences.append(error.message)
                self._countable = False
                return None
            if self._countable:
                known = rows["label"][(rows["label"] >= 0) & (rows["label"] < len(self._counts))]
                self._counts += np.bincount(known, minlength=len(self._counts))
            return rows

    def close(self) -> list[str]:
        """The differences, once all shards are checked."""
        if self._index is not None:
            self._index.close()
        expected = self.split.class_counts
        if (
            self._countable
            and expected
            and dict(zip(self._classes, self._counts.tolist())) != expected
        ):
            other = f"split {self._name}: the index counts other classes than the card"
            return [*self._differences, other]
        return self._differences


def _index_problem(storage: Storage, split: SplitCard) -> str:
    """The problem with the index file; empty if there is none."""
    if storage.remote:  # its checksum is checked when it is downloaded
        return ""
    path = storage.fetch(split.index, size_bytes=split.index_bytes, sha256=split.index_sha256)
    if not path.is_file():
        return "is missing"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == split.index_sha256
    return "" if same else "checksum differs"


def _check_shard(
    storage: Storage, card: Card, folder: Path, shard: Shard, table: _Table, number: int
) -> list[str]:
    name, rows = f"shard {shard.path}", table.rows(number)
    try:
        with _opened(storage, shard, folder) as file:
            size = os.fstat(file.fileno()).st_size
            whole, wrong = _read_through(file, shard, rows, card)
    except TesseraError as error:
        return [f"{name}: {error.message}"]
    except FileNotFoundError:
        return [f"{name} is missing"]
    except OSError as error:
        return [f"{name} can't be read: {error.strerror}"]
    if size != shard.size_bytes:
        whole = f"has {size:,} bytes, the card says {shard.size_bytes:,}"
    if wrong:
        whole = f"{whole or 'differs from the index'}; {len(wrong)} of "
        return [f"{name}: {whole}{shard.samples} samples differ, the first is {wrong[0]}"]
    return [f"{name}: {whole}"] if whole else []


@contextmanager
def _opened(storage: Storage, shard: Shard, folder: Path) -> Iterator[BinaryIO]:
    if not storage.remote:
        path = storage.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
        if not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=folder) as copy:
        storage.download(shard.path, Path(copy.name))
        with open(copy.name, "rb") as file:
            yield file


def _read_through(
    file: BinaryIO, shard: Shard, rows: Rows | None, card: Card
) -> tuple[str, list[str]]:
    """The problem with the shard as a whole, and the keys of the samples that differ."""
    digest, at, wrong = hashlib.sha256(), 0, []
    for row in map(Row._make, () if rows is None else rows.tolist()):
        gap = row.offset - at
        if gap < 0:
            return "its samples overlap", [_key(row)]
        digest.update(file.read(gap))
        data = file.read(row.size)
        digest.update(data)
        at += gap + row.size
        if zlib.crc32(data) != row.crc32 or len(data) != row.size:
            wrong.append(_key(row))
        elif not card.root and (problem := _misfit(data, row, card)):
            wrong.append(f"{_key(row)} ({problem})")
    while block := file.read(1 << 20):
        digest.update(block)
    return ("" if digest.hexdigest() == shard.sha256 else "checksum differs"), wrong


def _misfit(data: bytes, row: Row, card: Card) -> str:
    """How the members of a sample differ from its row of the index; empty if they don't."""
    note = ANNOTATION_EXTENSIONS[card.task]
    name = _member(data, row.image, row.image_size)
    if name.rpartition(b".")[0] != row.key:
        return "its image isn't at the indexed offset"
    taken = BLOCK + padded(row.image_size)
    if note:
        if _member(data, row.note, row.note_size) != row.key + b"." + note.encode():
            return f"its .{note} isn't at the indexed offset"
        taken += BLOCK + padded(row.note_size)
    if note == "cls" and data[row.note : row.note + row.note_size] != b"%d" % row.label:
        return "its class differs from the index"
    return "" if taken == row.size else "it has other members"


def _member(data: bytes, start: int, size: int) -> bytes:
    """The name of the member whose content begins at `start`; empty if none of that size does. The
    header's own checksum isn't checked: the checksum of the sample includes it."""
    header = data[max(start - BLOCK, 0) : start]
    return header[:100].rstrip(b"\0") if header[124:136] == b"%011o\0" % size else b""


def _key(row: Row) -> str:
    return row.key.decode("ascii", "backslashreplace")
