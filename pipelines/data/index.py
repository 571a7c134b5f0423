"""The index of a split: where each sample is stored in its shard, and its checksum.

In: rows made while packing. Out: `SPLIT/index.npy`, and later the row of any sample. Must not know
the content of the shards. `numpy.load` can read the file.

The rows are sorted by shard, and the card has the number of rows of each shard, so a sample's
number gives its shard. The card also has a checksum of each shard's rows: opening a data set reads
no rows, however many shards it has, and rows are verified when they are read.

    offset, size       of all members of the sample with headers and padding, in bytes in the shard
    image, image_size  of the image's bytes, relative to `offset`
    note, note_size    of the annotation's bytes, relative to `offset`; 0, 0 if there is none
    crc32              of the `size` bytes
    label              class index; -1 if the data set has no class labels
    key                ASCII, at most 92 characters
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.card import MAX_KEY_LENGTH, SplitCard
from pipelines.data.tar import damaged
from pipelines.storage.base import Storage

FIELDS = [
    ("offset", "<u8"),
    ("size", "<u8"),
    ("image", "<u4"),
    ("image_size", "<u4"),
    ("note", "<u4"),
    ("note_size", "<u4"),
    ("crc32", "<u4"),
    ("label", "<i4"),
]
MAX_SAMPLE_BYTES = 1 << 30
KEPT_SHARDS = 64
"""Number of shards whose rows are kept in memory."""
FETCHED_BYTES = 64 << 20
"""A remote index up to this size is fetched as one file. Of a larger one the rows of a shard are
read when they are needed: a hundred million samples have an index of 6 GB, and fetching it on each
of a thousand machines would delay a training by minutes."""
_MAX_HEADER_BYTES = 4096
_KEY_BYTES = np.zeros(256, bool)
_KEY_BYTES[list(b"\0/-_~%0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")] = True
Rows = np.ndarray[Any, Any]


def row_type(key_length: int) -> np.dtype[Any]:
    """The dtype of a row whose key has up to `key_length` bytes."""
    return np.dtype([*FIELDS, ("key", f"S{max(key_length, 1)}")])


def rows_of(keys: Sequence[str], fields: Sequence[tuple[int, ...]]) -> Rows:
    """Makes rows from the keys and, for each, the values of `FIELDS` in order."""
    rows = np.zeros(len(keys), row_type(max(map(len, keys), default=1)))
    for row, (key, values) in enumerate(zip(keys, fields, strict=True)):
        rows[row] = (*values, key.encode("ascii"))
    return rows


def write_index(path: Path, tables: Sequence[Rows]) -> tuple[list[str], int, str]:
    """Writes the rows of all shards to `path` and waits until they are on the disk. Returns the
    sha256 of each shard's rows, and the size in bytes and the sha256 of the file."""
    width = max((table.dtype["key"].itemsize for table in tables), default=1)
    rows = np.zeros(sum(map(len, tables)), row_type(width))
    sums, at = [], 0
    for table in tables:
        part = rows[at : at + len(table)]
        for name in part.dtype.names or ():
            part[name] = table[name]
        sums.append(hashlib.sha256(part.tobytes()).hexdigest())
        at += len(table)
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return sums, path.stat().st_size, sha256


class Index:
    """The rows of a split, which are read and verified shard by shard. Not thread-safe.

    Raises TesseraError if the index is missing, damaged or doesn't match the card: its header when
    it is opened, the rows of a shard when they are first read.
    """

    def __init__(self, storage: Storage, card: SplitCard) -> None:
        self._card, self._name = card, f"index {card.index} of {storage.where}"
        self.starts = np.cumsum([0, *(shard.samples for shard in card.shards)])
        """int64 (shards + 1,): the first sample of each shard, then the number of all samples."""
        if card.samples != self.starts[-1]:
            raise damaged(
                f"the card of {storage.where} has another number of samples than its shards"
            )
        self._storage, self._file = storage, -1
        if storage.remote and card.index_bytes > FETCHED_BYTES:
            size = storage.size(card.index)
            if size is None:
                raise damaged(f"{self._name} is missing")
        else:
            size = self._open(storage)
        self._kept: OrderedDict[int, Rows] = OrderedDict()
        self._head, self._type = self._read_header(size)

    def __len__(self) -> int:
        return self._card.samples

    def gather(self, samples: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Rows]:
        """Returns the shard numbers, int64 (N,), and the rows (N,) of samples, int64 (N,), in
        order."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        result = np.empty(len(samples), self._type)
        for shard in np.unique(shards).tolist():
            positions = np.flatnonzero(shards == shard)
            result[positions] = self.rows(shard)[samples[positions] - self.starts[shard]]
        return shards, result

    def rows(self, shard: int) -> Rows:
        """Returns all rows of a shard, from memory or from the file."""
        rows = self._kept.get(shard)
        if rows is None:
            rows = self._kept[shard] = self._read(shard)
            if len(self._kept) > KEPT_SHARDS:
                self._kept.popitem(last=False)
        return rows

    def labels(self) -> np.ndarray[Any, Any]:
        """The labels of all samples, int64 (N,)."""
        shards = range(len(self.starts) - 1)
        parts = [self.rows(shard)["label"].astype(np.int64) for shard in shards]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def close(self) -> None:
        """Closes the local file, if there is one."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _open(self, storage: Storage) -> int:
        """Opens the index as a local file, and returns its size in bytes."""
        card = self._card
        path = storage.fetch(card.index, size_bytes=card.index_bytes, sha256=card.index_sha256)
        if not path.is_file():
            raise damaged(f"{self._name} is missing")
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise damaged(f"{self._name} is missing") from None
        return os.fstat(self._file).st_size

    def _read_bytes(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of the index, fewer if a local file ends early."""
        if self._file >= 0:
            return os.pread(self._file, stop - start, start)
        return self._storage.read_range(self._card.index, start, stop)

    def _read_header(self, size: int) -> tuple[int, np.dtype[Any]]:
        try:
            file = io.BytesIO(self._read_bytes(0, min(size, _MAX_HEADER_BYTES)))
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(version)
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            head = file.tell()
        except TesseraError:
            raise
        except Exception:  # NumPy's parser raises almost any error on a damaged header
            raise damaged(f"{self._name} is not a valid index") from None
        width = kind["key"].itemsize if kind.names and "key" in kind.names else 0
        if not 1 <= width <= MAX_KEY_LENGTH or kind != row_type(width):
            raise damaged(f"{self._name} has rows of another type")
        if shape != (self._card.samples,) or size != head + self._card.samples * kind.itemsize:
            raise damaged(
                f"{self._name} has {shape} rows, the card says {self._card.samples} samples"
            )
        return head, kind

    def _read(self, shard: int) -> Rows:
        card, where = self._card.shards[shard], f"{self._name}, shard {shard}"
        size = card.samples * self._type.itemsize
        start = self._head + int(self.starts[shard]) * self._type.itemsize
        data = self._read_bytes(start, start + size)
        if len(data) != size or hashlib.sha256(data).hexdigest() != card.rows_sha256:
            raise damaged(f"{where}: checksum differs")
        rows = np.frombuffer(data, self._type)
        sizes = rows["size"]
        if len(rows) and int(sizes.max()) > MAX_SAMPLE_BYTES:
            raise damaged(f"{where} has a sample of more than {MAX_SAMPLE_BYTES:,} bytes")
        ends = rows["offset"] + sizes
        if (ends < rows["offset"]).any() or (ends > card.size_bytes).any():
            raise damaged(f"{where} points beyond the end of a shard")
        for name in ("image", "note"):
            if (rows[name].astype(np.uint64) + rows[f"{name}_size"] > sizes).any():
                raise damaged(f"{where} points beyond the end of a sample")
        keys = np.ascontiguousarray(rows["key"])
        if not _KEY_BYTES[
            keys.view(np.uint8)
        ].all():  # keys are printed, and written to other files
            raise damaged(f"{where} has a key with characters that are not allowed")
        return rows
