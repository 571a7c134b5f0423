"""The index of a split: where each sample lies in its shard, and what it must be.

In: rows made while packing. Out: `SPLIT/index.npy`, and later any sample's row. Must not know what
lies in the shards. `numpy.load` reads the file.

The rows are sorted by shard, and the card says how many each shard has, so a sample's number gives
its shard. The rows of a shard have a checksum of their own in the card: opening a data set reads
none of them, however many shards it has, and what is read is checked.

    offset, size      of all members of the sample with headers and padding, in bytes in the shard
    image, image_size  of the image's bytes, from `offset` on
    note, note_size    of what is said of it, from `offset` on; 0, 0 where nothing is
    crc32              over the `size` bytes
    label              class index; -1 where the data has no classes of whole images
    key                ASCII, at most 92 characters
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
_OF_KEYS = np.zeros(256, bool)
_OF_KEYS[list(b"\0/-_~%0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")] = True
Rows = np.ndarray[Any, Any]


def row_type(key_length: int) -> np.dtype[Any]:
    return np.dtype([*FIELDS, ("key", f"S{max(key_length, 1)}")])


def rows_of(keys: Sequence[str], fields: Sequence[tuple[int, ...]]) -> Rows:
    """Rows with the values of `FIELDS`, in their order, and the keys."""
    rows = np.zeros(len(keys), row_type(max(map(len, keys), default=1)))
    for at, (key, values) in enumerate(zip(keys, fields, strict=True)):
        rows[at] = (*values, key.encode("ascii"))
    return rows


def write_index(path: Path, tables: Sequence[Rows]) -> tuple[list[str], int, str]:
    """Writes the rows of all shards. Gives each shard's checksum, and the file's size and sha256."""
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
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    return sums, path.stat().st_size, whole


class Index:
    """A split's rows, read shard by shard and checked when they are. Not for several threads."""

    def __init__(self, storage: Storage, card: SplitCard) -> None:
        self._card, self._name = card, f"index {card.index} of {storage.where}"
        self.starts = np.cumsum([0, *(shard.samples for shard in card.shards)])
        """First sample of each shard, and the number of all samples."""
        if card.samples != self.starts[-1]:
            raise damaged(f"the card of {storage.where} counts other samples than its shards")
        path = storage.fetch(card.index, size_bytes=card.index_bytes, sha256=card.index_sha256)
        if not path.is_file():
            raise damaged(f"{self._name} is missing")
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise damaged(f"{self._name} is missing") from None
        self._kept: OrderedDict[int, Rows] = OrderedDict()
        self._head, self._type = self._read_header(path)

    def __len__(self) -> int:
        return self._card.samples

    def gather(self, samples: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Rows]:
        """(shards, rows) of samples by their numbers, int64 (N,), in their order."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        found = np.empty(len(samples), self._type)
        for shard in np.unique(shards).tolist():
            of_it = np.flatnonzero(shards == shard)
            found[of_it] = self.rows(shard)[samples[of_it] - self.starts[shard]]
        return shards, found

    def rows(self, shard: int) -> Rows:
        """All rows of a shard."""
        found = self._kept.get(shard)
        if found is None:
            found = self._kept[shard] = self._read(shard)
            if len(self._kept) > KEPT_SHARDS:
                self._kept.popitem(last=False)
        return found

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _read_header(self, path: Path) -> tuple[int, np.dtype[Any]]:
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(version)
                shape, _, kind = np.lib.format.read_array_header_1_0(file)
                head = file.tell()
                size = os.fstat(file.fileno()).st_size
        except Exception:  # NumPy's parser raises nearly everything on a damaged header
            raise damaged(f"{self._name} is no index") from None
        width = kind["key"].itemsize if kind.names and "key" in kind.names else 0
        if not 1 <= width <= MAX_KEY_LENGTH or kind != row_type(width):
            raise damaged(f"{self._name} has rows of another form")
        if shape != (self._card.samples,) or size != head + self._card.samples * kind.itemsize:
            raise damaged(
                f"{self._name} has {shape} rows, the card says {self._card.samples} samples"
            )
        return head, kind

    def _read(self, shard: int) -> Rows:
        card, where = self._card.shards[shard], f"{self._name}, shard {shard}"
        size = card.samples * self._type.itemsize
        start = self._head + int(self.starts[shard]) * self._type.itemsize
        data = os.pread(self._file, size, start)
        if len(data) != size or hashlib.sha256(data).hexdigest() != card.rows_sha256:
            raise damaged(f"{where}: checksum differs")
        rows = np.frombuffer(data, self._type)
        sizes = rows["size"]
        if len(rows) and int(sizes.max()) > MAX_SAMPLE_BYTES:
            raise damaged(f"{where} has a sample of more than {MAX_SAMPLE_BYTES:,} bytes")
        ends = rows["offset"] + sizes
        if (ends < rows["offset"]).any() or (ends > card.size_bytes).any():
            raise damaged(f"{where} points behind the end of a shard")
        for name in ("image", "note"):
            if (rows[name].astype(np.uint64) + rows[f"{name}_size"] > sizes).any():
                raise damaged(f"{where} points behind the end of a sample")
        keys = np.ascontiguousarray(rows["key"])
        if not _OF_KEYS[keys.view(np.uint8)].all():  # they are printed, and go into other files
            raise damaged(f"{where} has a key with other characters than keys have")
        return rows
