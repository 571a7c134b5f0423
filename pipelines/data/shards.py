"""The WebDataset room: samples into tars, and any sample straight out of its tar.

In: samples, as (key, bytes by extension). Out: `DIR/SPLIT/000000.tar …`, `DIR/SPLIT/index.npy` and a `SplitCard`; then
samples by index. Must not know tasks, images or batches. Stock `webdataset` and `tar` read the
shards; here they are read by a small strict parser, because the library gives no exact access,
takes a damaged shard for a shorter one, and its decoder runs pickles.

The index is a structured array, one row a sample: `shard` (number of the tar in the card), `offset`
and `size` in bytes (all members of the sample with headers and padding), `crc32` over them.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from models.core.errors import TesseraError
from pipelines.data.card import EXTENSIONS, Card, Shard, SplitCard, check_key

Sample = tuple[str, Mapping[str, bytes]]
"""A key, and the bytes of its members by extension without the dot."""
INDEX_TYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])
SHARD_SAMPLES = 4000
SHARD_BYTES = 64 << 20
MAX_SAMPLE_BYTES = 1 << 30
MAX_OPEN_SHARDS = 128
_BLOCK = 512
_ALLOWED = f"a shard holds KEY.{', KEY.'.join(sorted(EXTENSIONS))}"


def write(
    folder: Path,
    split: str,
    samples: Iterable[Sample],
    *,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
) -> SplitCard:
    """Writes one split below `folder` and gives its card (without class counts).

    A shard ends after `shard_samples` samples, or before it would pass `shard_bytes`. The same
    samples give the same bytes. The first write error leaves what it has written: the caller owns
    the folder.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    rows: list[np.ndarray[Any, Any]] = []
    for part in _cut(samples, shard_samples, shard_bytes):
        path = f"{split}/{len(shards):06d}.tar"
        shard, table = _write_shard(folder, path, part)
        table["shard"] = len(shards)
        shards.append(shard)
        rows.append(table)
    index = np.concatenate(rows) if rows else np.zeros(0, INDEX_TYPE)
    index_path = f"{split}/index.npy"
    with (folder / index_path).open("wb") as file:
        np.save(file, index, allow_pickle=False)
        _flush(file)
    return SplitCard(
        samples=len(index),
        shards=tuple(shards),
        index=index_path,
        index_sha256=_sha256(folder / index_path),
    )


def _cut(samples: Iterable[Sample], most: int, most_bytes: int) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    size = 0
    for sample in samples:
        grows = sum(_BLOCK + _padded(len(data)) for data in sample[1].values())
        if part and (len(part) >= most or size + grows > most_bytes):
            yield part
            part, size = [], 0
        part.append(sample)
        size += grows
    if part:
        yield part


def _write_shard(
    folder: Path, path: str, samples: list[Sample]
) -> tuple[Shard, np.ndarray[Any, Any]]:
    from webdataset import TarWriter

    ends = []
    with (folder / path).open("wb") as file:
        writer = TarWriter(file, user="tessera", group="tessera", mtime=0, encoder=False)
        for key, fields in samples:
            check_key(key, path)
            if not fields or not fields.keys() <= EXTENSIONS:
                raise TesseraError(f"sample {key} has the fields {sorted(fields)}", mend=_ALLOWED)
            writer.write({"__key__": key, **fields})
            ends.append(writer.tarstream.offset)
        writer.close()
        _flush(file)
    data = (folder / path).read_bytes()
    table = np.zeros(len(samples), INDEX_TYPE)
    start = 0
    for row, end in enumerate(ends):
        table[row] = (0, start, end - start, zlib.crc32(memoryview(data)[start:end]))
        start = end
    sha256 = hashlib.sha256(data).hexdigest()
    return Shard(path=path, samples=len(samples), size_bytes=len(data), sha256=sha256), table


class ShardReader:
    """Samples of one split by index, each read with one system call and checked before it is
    parsed.

    Opening checks the index's checksum and each shard's size; a shard is opened when its first
    sample is asked for. Works after a fork and goes through pickle (it opens anew). Not for several
    threads at once.
    """

    def __init__(self, folder: Path, split_card: SplitCard) -> None:
        self._folder, self._card = folder, split_card
        self._open: OrderedDict[int, int] = OrderedDict()
        check_sizes(folder, split_card)
        self._index = _load_index(folder, split_card)

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardReader, (self._folder, self._card))

    def read(self, index: int) -> tuple[str, dict[str, bytes]]:
        """The sample at `index`. Raises TesseraError that names shard and sample."""
        shard, offset, size, crc32 = self._index[index].tolist()
        where = f"shard {self._card.shards[shard].path}, sample {index}"
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise TesseraError(f"{where} can't be read: {error.strerror}") from None
        if len(data) != size:
            raise _damaged(f"{where}: {len(data)} of {size} bytes are there")
        if zlib.crc32(data) != crc32:
            raise _damaged(f"{where}: checksum differs")
        return parse_sample(data, where)

    def _file(self, shard: int) -> int:
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        path = _locate(self._folder, self._card.shards[shard].path)
        self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


def parse_sample(data: bytes, where: str) -> tuple[str, dict[str, bytes]]:
    """A sample from its tar members. Only regular files with allowed names and extensions."""
    key: str | None = None
    fields: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        name, size = _parse_header(data[at : at + _BLOCK], where)
        stem, extension = _split_name(name, where)
        if key is None:
            check_key(stem, where)
            key = stem
        if stem != key:
            raise _damaged(f"{where}: members of two samples, {key!r} and {stem!r}")
        if extension in fields:
            raise _damaged(f"{where}: two members {name!r}")
        at += _BLOCK
        if at + _padded(size) > len(data):
            raise _damaged(f"{where}: member {name!r} says {size} bytes and is cut short")
        fields[extension] = data[at : at + size]
        at += _padded(size)
    if key is None:
        raise _damaged(f"{where}: no members")
    return key, fields


def check_sizes(folder: Path, split_card: SplitCard) -> None:
    """Each shard is there and as long as the card says; else TesseraError names the shard."""
    for shard in split_card.shards:
        path = _locate(folder, shard.path)
        try:
            found = path.stat().st_size
        except OSError:
            raise _damaged(f"shard {shard.path} of {folder} is missing") from None
        if found != shard.size_bytes:
            raise _damaged(
                f"shard {shard.path} of {folder} has {found} bytes, the card says "
                f"{shard.size_bytes}"
            )


def verify(folder: Path, card: Card, *, full: bool = False) -> None:
    """Checks every split's index and shard sizes; with `full` every byte of every shard."""
    for split_card in card.splits.values():
        check_sizes(folder, split_card)
        _load_index(folder, split_card)
        for shard in split_card.shards if full else ():
            if _sha256(_locate(folder, shard.path)) != shard.sha256:
                raise _damaged(f"shard {shard.path} of {folder}: checksum differs")


def _load_index(folder: Path, split_card: SplitCard) -> np.ndarray[Any, Any]:
    path = _locate(folder, split_card.index)
    if not path.is_file():
        raise _damaged(f"index {split_card.index} of {folder} is missing")
    if _sha256(path) != split_card.index_sha256:
        raise _damaged(f"index {split_card.index} of {folder}: checksum differs")
    index: np.ndarray[Any, Any]
    try:
        index = np.load(path, mmap_mode="r" if split_card.samples else None, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise _damaged(f"index {split_card.index} of {folder} is no index") from None
    if index.dtype != INDEX_TYPE or index.shape != (split_card.samples,):
        raise _damaged(
            f"index {split_card.index} of {folder} has {index.shape} rows of {index.dtype}, the "
            f"card says {split_card.samples} samples"
        )
    _check_rows(index, split_card, f"index {split_card.index} of {folder}")
    return index


def _check_rows(index: np.ndarray[Any, Any], split_card: SplitCard, where: str) -> None:
    if not len(index):
        return
    if int(index["shard"].max()) >= len(split_card.shards):
        raise _damaged(f"{where} points to a shard that the card doesn't have")
    if int(index["size"].max()) > MAX_SAMPLE_BYTES:
        raise _damaged(f"{where} has a sample of more than {MAX_SAMPLE_BYTES:,} bytes")
    lengths = np.array([shard.size_bytes for shard in split_card.shards], np.uint64)
    ends = index["offset"] + index["size"]
    if (ends < index["offset"]).any() or (ends > lengths[index["shard"]]).any():
        raise _damaged(f"{where} points behind the end of a shard")
    counts = np.bincount(index["shard"], minlength=len(split_card.shards)).tolist()
    if counts != [shard.samples for shard in split_card.shards]:
        raise _damaged(f"{where} counts other samples in the shards than the card")


def _locate(folder: Path, path: str) -> Path:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or ":" in path or "\0" in path:
        raise TesseraError(
            f"the card of {folder} names the file {path!r}, which is not allowed",
            mend="files of a data set lie in its folder",
        )
    return folder.joinpath(*parts)


def _parse_header(header: bytes, where: str) -> tuple[str, int]:
    """(name, size in bytes) of a regular file's ustar header."""
    if len(header) != _BLOCK:
        raise _damaged(f"{where}: a header is cut short")
    if header[257:262] != b"ustar":
        raise _damaged(f"{where}: no ustar header")
    given = _octal(header[148:156], where)
    if given != sum(header) - sum(header[148:156]) + 8 * 32:
        raise _damaged(f"{where}: a header's checksum differs")
    if header[156:157] not in (b"0", b"\0"):
        raise TesseraError(
            f"{where}: a member of type {header[156:157]!r} is refused",
            mend="only regular files may lie in a shard: no links, devices, sparse or pax members",
        )
    prefix, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
    full = prefix + b"/" + name if prefix else name
    return full.decode("ascii", "backslashreplace"), _octal(header[124:136], where)


def _split_name(name: str, where: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if extension not in EXTENSIONS:
        raise TesseraError(
            f"{where}: the member {name[:120]!r} is refused",
            mend=_ALLOWED,
        )
    return folder + slash + stem, extension


def _octal(field: bytes, where: str) -> int:
    digits = field.strip(b" \0")
    if not digits or not all(48 <= d < 56 for d in digits):
        raise _damaged(f"{where}: a header has the number {field!r}")
    return int(digits, 8)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _damaged(message: str) -> TesseraError:
    return TesseraError(message, mend="fetch or pack the data set again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
