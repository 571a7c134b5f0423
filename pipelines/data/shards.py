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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from models.core.errors import TesseraError
from pipelines.data import storage
from pipelines.data.card import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    NOTE_EXTENSIONS,
    Card,
    Shard,
    SplitCard,
    check_key,
)
from pipelines.data.index import Index, Rows, rows_of, write_index
from pipelines.data.tars import BLOCK, damaged, members, padded

SHARD_SAMPLES = 4000
SHARD_BYTES = 64 << 20
MAX_OPEN_SHARDS = 128
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
        for sample in samples:
            _check(sample, path)
            parts = dict([sample.image, *([sample.note] if sample.note else [])])
            writer.write({"__key__": sample.key, **parts})
            keys.append(sample.key)
            ends.append(writer.tarstream.offset)
            labels.append(sample.label)
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
        raise TesseraError(f"sample {sample.key} has an image .{sample.image[0]}", mend=_ALLOWED)
    if sample.note and (not sample.note[0] or sample.note[0] not in NOTE_EXTENSIONS.values()):
        raise TesseraError(f"sample {sample.key} has a member .{sample.note[0]}", mend=_ALLOWED)


def _row(data: memoryview, start: int, label: int, path: str) -> tuple[int, ...]:
    """The values of `index.FIELDS` for the sample whose members are `data`."""
    places = {"image": (0, 0), "note": (0, 0)}
    for member in members(data, path):
        extension = member.name.rpartition("/")[2].partition(".")[2]
        kind = "image" if extension in IMAGE_EXTENSIONS else "note"
        places[kind] = (member.start, member.size)
    return (start, len(data), *places["image"], *places["note"], zlib.crc32(data), label)


class ShardReader:
    """Samples of one split by number, each read with one system call and checked before it is used.

    Opening looks at the size of each local shard; a shard is opened when its first sample is asked
    for. Works after a fork and goes through pickle (it opens anew). Not for several threads at once.
    """

    def __init__(self, where: str | Path, card: Card, split: str) -> None:
        self._args = (where, card, split)
        self._card = card.split(split)
        place = storage.at(where)
        self._place = storage.at(card.root) if card.root else place
        self._open: OrderedDict[int, int] = OrderedDict()
        if not self._place.remote:  # elsewhere it is a request a shard, and `fetch` checks them
            check_sizes(self._place, self._card)
        self.index = Index(place, self._card)

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardReader, self._args)

    def read(self, sample: int) -> Stored:
        """The sample of that number. Raises TesseraError that names shard and sample."""
        shard, row = self.index.find(sample)
        offset, size, image, image_size, note, note_size, crc32, label, key = row.item()
        where = f"shard {self._card.shards[shard].path}, sample {sample}"
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise TesseraError(f"{where} can't be read: {error.strerror}") from None
        if len(data) != size:
            raise damaged(f"{where}: {len(data)} of {size} bytes are there")
        if zlib.crc32(data) != crc32:
            raise damaged(f"{where}: checksum differs")
        return Stored(
            key.decode("ascii", "backslashreplace"),
            data[image : image + image_size],
            data[note : note + note_size],
            label,
        )

    def _file(self, shard: int) -> int:
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        card = self._card.shards[shard]
        self._open[shard] = self._place.open(
            card.path, size_bytes=card.size_bytes, sha256=card.sha256
        )
        return self._open[shard]

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def check_sizes(place: storage.Place, split_card: SplitCard) -> None:
    """Each shard is there and as long as the card says; else TesseraError names the shard."""
    sizes = place.sizes([shard.path for shard in split_card.shards])
    for shard in split_card.shards:
        found = sizes.get(shard.path)
        if found is None:
            raise damaged(f"shard {shard.path} of {place.where} is missing")
        if found != shard.size_bytes:
            raise damaged(
                f"shard {shard.path} of {place.where} has {found} bytes, the card says "
                f"{shard.size_bytes}"
            )


def verify(where: str | Path, card: Card, *, full: bool = False) -> None:
    """Checks every split's index and shard sizes; with `full` every byte of every shard."""
    place = storage.at(where)
    shards = storage.at(card.root) if card.root else place
    for split_card in card.splits.values():
        check_sizes(shards, split_card)
        index = Index(place, split_card)
        for number, shard in enumerate(split_card.shards):
            index.rows(number)
            if full:
                path = shards.fetch(shard.path, size_bytes=shard.size_bytes, sha256=shard.sha256)
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        raise damaged(f"shard {shard.path} of {where}: checksum differs")
