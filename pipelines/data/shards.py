"""Writes samples into tar shards and reads them back, in the format of WebDataset.

In: samples with their bytes. Out: `SPLIT/000000.tar …` and the rows of their index; then samples by
number. Must not know tasks, images or batches. The only module that imports WebDataset, which it
uses to write; stock `webdataset` and `tar` can read the shards. Here a sample is read through its
row of the index, because the library gives no random access, takes a damaged shard for a shorter
one, and its decoder unpickles.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.card import (
    ANNOTATION_EXTENSIONS,
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    Card,
    Shard,
    SplitCard,
    check_key,
)
from pipelines.data.index import Index, Rows, rows_of, write_index
from pipelines.data.tar import BLOCK, damaged, members, padded
from pipelines.storage.base import Storage
from pipelines.storage.open import open_shards, open_storage

SHARD_SAMPLES = 4000
SHARD_BYTES = 64 << 20
MAX_OPEN_SHARDS = 128
PIECE_BYTES = 4 << 20
"""The most bytes that are read before they are decoded, if they are of several samples."""
_ALLOWED = f"a shard may contain KEY.{', KEY.'.join(sorted(EXTENSIONS))}"


class Packed(NamedTuple):
    """A sample to be written to a shard.

    `image` and `note` are (extension, bytes); `note` is the annotation, None if there is none. In a
    data set of classes `label` is the class index, which the annotation has too; otherwise -1.
    """

    key: str
    image: tuple[str, bytes]
    note: tuple[str, bytes] | None = None
    label: int = -1

    @property
    def size_bytes(self) -> int:
        """The bytes that the sample occupies in a tar file, with headers and padding."""
        return sum(BLOCK + padded(len(part[1])) for part in (self.image, self.note) if part)


class Stored(NamedTuple):
    """A sample read from a shard. `note` is the annotation's bytes, empty if there is none; `label`
    is the class index or -1."""

    key: str
    image: bytes
    note: bytes
    label: int


def write(
    folder: Path,
    split: str,
    samples: Iterable[Packed],
    *,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
) -> SplitCard:
    """Writes one split below `folder` and returns its card, without class counts.

    A shard ends after `shard_samples` samples, or before it would exceed `shard_bytes`.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    written = []
    for number, part in enumerate(_split(samples, shard_samples, shard_bytes)):
        path = f"{split}/{number:06d}.tar"
        written.append(write_shard(folder / path, path, part))
    return finish_split(folder, split, written)


def write_shard(file: Path, path: str, samples: Iterable[Packed]) -> tuple[Shard, Rows]:
    """Writes one tar file and waits until it is on the disk. Equal samples give equal bytes.

    `path` is its path in the card. `finish_split` sets the shard's `rows_sha256`. Raises
    TesseraError for a key or an extension that is not allowed.
    """
    from webdataset import TarWriter

    keys, ends, labels = [], [], []
    with file.open("wb") as stream:
        writer = TarWriter(stream, user="tessera", group="tessera", mtime=0, encoder=False)
        try:
            for sample in samples:
                _check(sample, path)
                parts = dict([sample.image, *([sample.note] if sample.note else [])])
                writer.write({"__key__": sample.key, **parts})
                keys.append(sample.key)
                ends.append(writer.tarstream.offset)
                labels.append(sample.label)
        except BaseException:
            with suppress(
                OSError
            ):  # otherwise it writes to the closed `stream` when it is collected
                writer.close()
            raise
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())
    data = memoryview(file.read_bytes())
    rows, start = [], 0
    for end, label in zip(ends, labels):
        rows.append(_row(data[start:end], start, label, path))
        start = end
    shard = Shard(
        path=path,
        samples=len(keys),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rows_sha256="",
    )
    return shard, rows_of(keys, rows)


def finish_split(folder: Path, split: str, written: list[tuple[Shard, Rows]]) -> SplitCard:
    """Writes the split's index below `folder` and returns its card, without class counts."""
    index = f"{split}/index.npy"
    sums, size, sha256 = write_index(folder / index, [rows for _, rows in written])
    shards = [
        shard.model_copy(update={"rows_sha256": total}) for (shard, _), total in zip(written, sums)
    ]
    return SplitCard(
        samples=sum(shard.samples for shard in shards),
        shards=tuple(shards),
        index=index,
        index_bytes=size,
        index_sha256=sha256,
    )


def _split(samples: Iterable[Packed], max_samples: int, max_bytes: int) -> Iterator[list[Packed]]:
    part: list[Packed] = []
    size = 0
    for sample in samples:
        if part and (len(part) >= max_samples or size + sample.size_bytes > max_bytes):
            yield part
            part, size = [], 0
        part.append(sample)
        size += sample.size_bytes
    if part:
        yield part


def _check(sample: Packed, path: str) -> None:
    check_key(sample.key, path)
    if sample.image[0] not in IMAGE_EXTENSIONS:
        raise TesseraError(f"sample {sample.key} has an image .{sample.image[0]}", hint=_ALLOWED)
    if sample.note and (not sample.note[0] or sample.note[0] not in ANNOTATION_EXTENSIONS.values()):
        raise TesseraError(f"sample {sample.key} has a member .{sample.note[0]}", hint=_ALLOWED)


def _row(data: memoryview, start: int, label: int, path: str) -> tuple[int, ...]:
    """Returns the values of `index.FIELDS` for the sample whose members are `data`."""
    positions = {"image": (0, 0), "note": (0, 0)}
    for member in members(data, path):
        extension = member.name.rpartition("/")[2].partition(".")[2]
        kind = "image" if extension in IMAGE_EXTENSIONS else "note"
        positions[kind] = (member.start, member.size)
    return (start, len(data), *positions["image"], *positions["note"], zlib.crc32(data), label)


class Piece(NamedTuple):
    """Consecutive samples, read and verified. `data`, uint8, has their members, and is valid only
    until the next piece is read; `starts`, int64, are the samples' first bytes in it, and `rows`
    their rows of the index."""

    data: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    rows: Rows


class ShardReader:
    """Reads samples of one split by number, each with one system call, and verifies its checksum.

    Opening compares the sizes of local shards with the card; a shard is opened when its first
    sample is read. A reader works after a fork, and can be pickled (the copy opens the files
    again). Not thread-safe.
    """

    def __init__(self, where: str | Path, card: Card, split: str) -> None:
        self._args = (where, card, split)
        self._card = card.split(split)
        self.reading = card.image.reading
        storage = open_storage(where)
        self._storage = open_shards(where, card.root)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._buffer = np.empty(0, np.uint8)
        if not self._storage.remote:  # remote: one request for each shard; `open` verifies them
            check_sizes(self._storage, self._card)
        self.index = Index(storage, self._card)

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardReader, self._args)

    def read(self, sample: int) -> Stored:
        """Reads one sample. Raises TesseraError that names shard and sample if it is damaged."""
        samples = np.array([sample])
        (piece,) = self.pieces(samples, *self.index.gather(samples))
        _, _, image, image_size, note, note_size, _, label, key = piece.rows[0].item()
        return Stored(
            key.decode("ascii", "backslashreplace"),
            piece.data[image : image + image_size].tobytes(),
            piece.data[note : note + note_size].tobytes(),
            label,
        )

    def pieces(
        self, samples: np.ndarray[Any, Any], shards: np.ndarray[Any, Any], rows: Rows
    ) -> Iterator[Piece]:
        """Yields samples, int64 (N,), in order and in pieces: as many as fit into `PIECE_BYTES`,
        and at least one. `shards` and `rows` come from `index.gather(samples)`. Raises TesseraError
        that names shard and sample if one is damaged."""
        ends = np.cumsum(rows["size"].astype(np.int64))
        at = 0
        while at < len(samples):
            begin = int(ends[at - 1]) if at else 0
            stop = max(at + 1, int(np.searchsorted(ends, begin + PIECE_BYTES, side="right")))
            part = slice(at, stop)
            starts = np.concatenate([[0], ends[part] - begin])
            self._fill(samples[part], shards[part], rows[part], int(starts[-1]))
            yield Piece(self._buffer[: starts[-1]], starts[:-1], rows[part])
            at = stop

    def prefetch(self, shards: Sequence[int]) -> None:
        """Starts to download remote shards in the background. Replaces the list of earlier
        calls."""
        self._storage.prefetch([self._card.shards[shard] for shard in shards])

    def _fill(
        self, samples: np.ndarray[Any, Any], shards: np.ndarray[Any, Any], rows: Rows, size: int
    ) -> None:
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        view, at = memoryview(self._buffer), 0  # type: ignore[arg-type]
        columns = (shards, rows["offset"], rows["size"], rows["crc32"])
        for number, (shard, offset, size, crc32) in enumerate(zip(*(v.tolist() for v in columns))):
            part = view[at : at + size]
            at += size
            where = partial(self._name, shard, samples[number])
            try:
                self._read(shard, part, offset, crc32, where)
            except TesseraError:
                # The copy in the cache may be what is damaged.
                if not self._discard_damaged(shard):
                    raise
                self._read(shard, part, offset, crc32, where)

    def _read(
        self, shard: int, part: memoryview, offset: int, crc32: int, where: Callable[[], str]
    ) -> None:
        try:
            count = os.preadv(self._file(shard), (part,), offset)
        except OSError as error:
            raise TesseraError(f"{where()} can't be read: {error.strerror}") from None
        if count != len(part):
            raise damaged(f"{where()}: only {count} of {len(part)} bytes exist")
        if zlib.crc32(part) != crc32:
            raise damaged(f"{where()}: checksum differs")

    def _discard_damaged(self, shard: int) -> bool:
        """Closes the shard and removes it from the cache if it is damaged there."""
        card = self._card.shards[shard]
        if not self._storage.discard_damaged(card.path, sha256=card.sha256):
            return False
        if (file := self._open.pop(shard, None)) is not None:
            os.close(file)
        return True

    def _name(self, shard: int, sample: int) -> str:
        return f"shard {self._card.shards[shard].path}, sample {sample}"

    def _file(self, shard: int) -> int:
        file = self._open.get(shard)
        if file is not None:
            return file
        if self._storage.remote:
            self._close_deleted()
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        card = self._card.shards[shard]
        file = self._storage.open(card.path, size_bytes=card.size_bytes, sha256=card.sha256)
        self._open[shard] = file
        return file

    def _close_deleted(self) -> None:
        """Closes shards that the cache has deleted: only then their bytes are free."""
        for shard, file in list(self._open.items()):
            if not os.fstat(file).st_nlink:
                os.close(self._open.pop(shard))

    def close(self) -> None:
        """Closes the shards; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def check_sizes(storage: Storage, split_card: SplitCard) -> None:
    """Raises TesseraError that names the first shard that is missing or whose size differs from the
    card."""
    sizes = storage.sizes([shard.path for shard in split_card.shards])
    for shard in split_card.shards:
        size = sizes.get(shard.path)
        if size is None:
            raise damaged(f"shard {shard.path} of {storage.where} is missing")
        if size != shard.size_bytes:
            raise damaged(
                f"shard {shard.path} of {storage.where} has {size} bytes, the card says "
                f"{shard.size_bytes}"
            )
