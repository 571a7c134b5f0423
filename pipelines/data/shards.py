"""The WebDataset room: samples into tars, and any sample straight out of its tar.

In: samples with their bytes. Out: `SPLIT/000000.tar …` and their rows of the index; then samples by
number. Must not know tasks, images or batches. Stock `webdataset` and `tar` read the shards; here a
sample is read by its row of the index, because the library gives no exact access, takes a damaged
shard for a shorter one, and its decoder runs pickles.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
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
"""What is read before it is decoded."""
_ALLOWED = f"a shard holds KEY.{', KEY.'.join(sorted(EXTENSIONS))}"


class Packed(NamedTuple):
    """A sample on its way into a shard. `image` and `note` are (extension, bytes); `note` is what is
    said of the image. `label` is the class index that the note of a classification set says, else
    -1."""

    key: str
    image: tuple[str, bytes]
    note: tuple[str, bytes] | None = None
    label: int = -1

    @property
    def size_bytes(self) -> int:
        """What it takes in a tar, with headers and padding."""
        return sum(BLOCK + padded(len(part[1])) for part in (self.image, self.note) if part)


class Stored(NamedTuple):
    """A sample as it lies in a shard. `note` is empty where nothing is said of the image."""

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
    """Writes one split below `folder` and gives its card (without class counts).

    A shard ends after `shard_samples` samples, or before it would pass `shard_bytes`.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    written = []
    for number, part in enumerate(_cut(samples, shard_samples, shard_bytes)):
        path = f"{split}/{number:06d}.tar"
        written.append(write_shard(folder / path, path, part))
    return finish_split(folder, split, written)


def write_shard(file: Path, path: str, samples: Iterable[Packed]) -> tuple[Shard, Rows]:
    """Writes one tar and waits until it is on the disk. `path` is what the card calls it. The same
    samples give the same bytes. The shard's `rows_sha256` is filled in by `finish_split`."""
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
            with suppress(OSError):  # else it writes when it is collected, after `stream` is closed
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
    """Writes the split's index below `folder` and gives its card (without class counts)."""
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


def _cut(samples: Iterable[Packed], most: int, most_bytes: int) -> Iterator[list[Packed]]:
    part: list[Packed] = []
    size = 0
    for sample in samples:
        if part and (len(part) >= most or size + sample.size_bytes > most_bytes):
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
    """The values of `index.FIELDS` for the sample whose members are `data`."""
    places = {"image": (0, 0), "note": (0, 0)}
    for member in members(data, path):
        extension = member.name.rpartition("/")[2].partition(".")[2]
        kind = "image" if extension in IMAGE_EXTENSIONS else "note"
        places[kind] = (member.start, member.size)
    return (start, len(data), *places["image"], *places["note"], zlib.crc32(data), label)


class Piece(NamedTuple):
    """Some samples, read and checked. They lie one after the other in `data`, uint8, which is only
    good until the next piece; `starts` says where. `rows` are their rows of the index."""

    data: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    rows: Rows


class ShardReader:
    """Samples of one split by number, each read with one system call and checked before it is used.

    Opening looks at the sizes of the shards; one is opened when its first sample is asked for. Works
    after a fork and goes through pickle (it opens anew). Not for several threads at once.
    """

    def __init__(self, where: str | Path, card: Card, split: str) -> None:
        self._args = (where, card, split)
        self._card = card.split(split)
        storage = open_storage(where)
        self._storage = open_shards(where, card.root)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._buffer = np.empty(0, np.uint8)
        if not self._storage.remote:  # elsewhere it is a request a shard, and `open` checks them
            check_sizes(self._storage, self._card)
        self.index = Index(storage, self._card)

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardReader, self._args)

    def read(self, sample: int) -> Stored:
        """The sample of that number. Raises TesseraError that names shard and sample."""
        wanted = np.array([sample])
        (piece,) = self.pieces(wanted, *self.index.gather(wanted))
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
        """The samples of those numbers, int64, in their order, some at a time: as many as fit into
        `PIECE_BYTES`, and at least one. Shards and rows are theirs, from `index.gather`. Raises
        TesseraError that names shard and sample."""
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
        """Begins to fetch remote shards in the background, and forgets those asked for before."""
        self._storage.prefetch([self._card.shards[shard] for shard in shards])

    def _fill(
        self, samples: np.ndarray[Any, Any], shards: np.ndarray[Any, Any], rows: Rows, size: int
    ) -> None:
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        view, at = memoryview(self._buffer), 0  # type: ignore[arg-type]
        wanted = (shards, rows["offset"], rows["size"], rows["crc32"])
        for number, (shard, offset, size, crc32) in enumerate(zip(*(v.tolist() for v in wanted))):
            part = view[at : at + size]
            at += size
            try:
                got = os.preadv(self._file(shard), (part,), offset)
            except OSError as error:
                where = self._name(shard, samples[number])
                raise TesseraError(f"{where} can't be read: {error.strerror}") from None
            if got != size:
                where = self._name(shard, samples[number])
                raise damaged(f"{where}: {got} of {size} bytes are there")
            if zlib.crc32(part) != crc32:
                raise damaged(f"{self._name(shard, samples[number])}: checksum differs")

    def _name(self, shard: int, sample: int) -> str:
        return f"shard {self._card.shards[shard].path}, sample {sample}"

    def _file(self, shard: int) -> int:
        found = self._open.get(shard)
        if found is not None:
            return found
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        card = self._card.shards[shard]
        opened = self._storage.open(card.path, size_bytes=card.size_bytes, sha256=card.sha256)
        self._open[shard] = opened
        return opened

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def check_sizes(storage: Storage, split_card: SplitCard) -> None:
    """Each shard is there and as long as the card says; else TesseraError names the shard."""
    found = storage.sizes([shard.path for shard in split_card.shards])
    for shard in split_card.shards:
        size = found.get(shard.path)
        if size is None:
            raise damaged(f"shard {shard.path} of {storage.where} is missing")
        if size != shard.size_bytes:
            raise damaged(
                f"shard {shard.path} of {storage.where} has {size} bytes, the card says "
                f"{shard.size_bytes}"
            )
