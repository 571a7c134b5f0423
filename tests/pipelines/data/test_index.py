"""A damaged or forged index is refused before a sample is read through it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import web_server
from small_shards import reader_of, some, stored

from models.core.errors import TesseraError
from pipelines.data import index as index_module
from pipelines.data import shards
from pipelines.data.card import SplitCard
from pipelines.data.index import Index
from pipelines.storage.base import CacheSettings
from pipelines.storage.http import HttpStorage
from pipelines.storage.retry import RetryPolicy


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, SplitCard]:
    return tmp_path, shards.write(tmp_path, "train", some(12), shard_samples=5)


@pytest.mark.fault(4)
def test_a_missing_or_damaged_index_is_reported(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    index = (folder / card.index).read_bytes()
    (folder / card.index).unlink()
    with pytest.raises(TesseraError, match=r"index train/index\.npy .* is missing"):
        reader_of(folder, card)
    for damage in (b"", index[:-1], index[:70]):
        (folder / card.index).write_bytes(damage)
        with pytest.raises(
            TesseraError, match=r"index train/index\.npy .*(is not a valid index|rows, the)"
        ):
            reader_of(folder, card)
    (folder / card.index).write_bytes(index[:-1] + b"x")
    with pytest.raises(TesseraError, match=r"index train/index\.npy .*shard 2: checksum differs"):
        reader_of(folder, card).read(11)


@pytest.fixture
def remote(
    written: tuple[Path, SplitCard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, SplitCard, HttpStorage]]:
    """The same shards behind a web server, and an index that is too large to be fetched."""
    folder, card = written
    monkeypatch.setattr(index_module, "FETCHED_BYTES", card.index_bytes - 1)
    cache = CacheSettings(tmp_path / "cache", 10 << 20)
    with web_server(folder) as port:
        yield folder, card, HttpStorage(f"http://127.0.0.1:{port}", cache, RetryPolicy())


def test_rows_of_a_large_remote_index_are_read_when_needed(
    remote: tuple[Path, SplitCard, HttpStorage],
) -> None:
    folder, card, storage = remote
    index, whole = Index(storage, card), np.load(folder / card.index)
    shards, rows = index.gather(np.array([11, 0, 6]))
    assert shards.tolist() == [2, 0, 1]
    assert rows.tolist() == whole[[11, 0, 6]].tolist()
    assert not list((folder / "cache").glob("[!.]*")), "the index was fetched whole"
    (folder / card.index).unlink()
    assert index.rows(0).tolist() == whole[:5].tolist(), "rows are kept"
    with pytest.raises(TesseraError, match=r"index\.npy .*is missing"):
        Index(storage, card)


def test_a_damaged_row_of_a_large_remote_index_is_reported(
    remote: tuple[Path, SplitCard, HttpStorage],
) -> None:
    folder, card, storage = remote
    index = Index(storage, card)
    data = (folder / card.index).read_bytes()
    (folder / card.index).write_bytes(data[:-1] + b"x")
    assert len(index.rows(1)) == 5
    with pytest.raises(TesseraError, match=r"shard 2: checksum differs"):
        index.rows(2)
    (folder / card.index).write_bytes(data[:-1])
    with pytest.raises(TesseraError, match=r"index\.npy .*(ends before|says 12 samples)"):
        Index(storage, card).rows(2)


def reindexed(folder: Path, card: SplitCard, index: np.ndarray) -> SplitCard:
    """A card for a replaced index, with valid checksums, as an attacker could create it."""
    out = io.BytesIO()
    np.save(out, index, allow_pickle=index.dtype == object)
    data = out.getvalue()
    (folder / card.index).write_bytes(data)
    forged, at = [], 0
    for shard in card.shards:
        rows = index[at : at + shard.samples]
        sha256 = "" if index.dtype == object else hashlib.sha256(rows.tobytes()).hexdigest()
        forged.append(shard.model_copy(update={"rows_sha256": sha256}))
        at += shard.samples
    update = {"index_sha256": hashlib.sha256(data).hexdigest(), "index_bytes": len(data)}
    return card.model_copy(update={**update, "shards": tuple(forged)})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset", 1 << 40, "beyond the end of a shard"),
        ("offset", 2**64 - 512, "beyond the end of a shard"),
        ("size", 1 << 40, "more than"),
        ("image", 1 << 20, "beyond the end of a sample"),
        ("image_size", 2**32 - 1, "beyond the end of a sample"),
        ("note_size", 1 << 20, "beyond the end of a sample"),
    ],
)
def test_a_forged_index_is_refused(
    written: tuple[Path, SplitCard], field: str, value: int, message: str
) -> None:
    folder, card = written
    index = np.load(folder / card.index)
    index[field][2] = value
    with pytest.raises(TesseraError, match=message):
        reader_of(folder, reindexed(folder, card, index)).read(2)


def test_an_index_with_other_rows_is_refused(
    written: tuple[Path, SplitCard],
) -> None:
    """The checksum of a shard's rows is verified when its first row is read."""
    folder, card = written
    index = np.load(folder / card.index)
    index["label"][7] = 0
    np.save(folder / card.index, index)
    reader = reader_of(folder, card)
    assert reader.read(0) == stored(12)[0]
    with pytest.raises(TesseraError, match=r"index train/index\.npy .*shard 1: checksum differs"):
        reader.read(7)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.fault(13)
@pytest.mark.control(13)
def test_a_pickled_index_is_not_executed(written: tuple[Path, SplitCard]) -> None:
    folder, card = written
    mark = folder / "mark"
    forged = np.array([Payload(mark)] * 12, dtype=object)
    card = reindexed(folder, card, forged)
    with pytest.raises(TesseraError, match=r"is not a valid index|rows of another type"):
        reader_of(folder, card)
    assert not mark.exists()
    np.load(folder / card.index, allow_pickle=True)  # the control: NumPy executes it
    assert mark.exists()
